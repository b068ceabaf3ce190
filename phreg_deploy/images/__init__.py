"""Image files and arrays from users -> uint8 RGB arrays at a model's input size; pictures of features. No PyTorch."""
