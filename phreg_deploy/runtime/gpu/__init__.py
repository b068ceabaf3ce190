"""CUDA, arrays on the GPU and a pool of their memory, TensorRT's library and ONNX Runtime's CUDA graphs."""
