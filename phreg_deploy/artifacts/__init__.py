"""Measure artifact tokens in the features of any model or bundle. Needs no PyTorch."""
