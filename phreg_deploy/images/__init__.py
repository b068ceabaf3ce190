"""Turn image files and arrays into uint8 RGB arrays at a model's input size, and features into pictures. No PyTorch."""
