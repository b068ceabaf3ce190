"""CUDA, arrays on the GPU, TensorRT's execution contexts and ONNX Runtime's CUDA graphs."""
