"""A bundle -> a TensorRT engine in it, built on the machine that runs it. No PyTorch."""
