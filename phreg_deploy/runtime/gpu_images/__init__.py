"""Fit frames in a GPU's memory to a model's input size, with Pillow's own steps, by a CUDA kernel of this project."""
