"""Build and inspect TensorRT plans. Needs TensorRT and a GPU, and neither torch nor onnx."""
