"""The images of an extraction: which there are, which part of them is this process's, and which cannot be read."""
