"""Run TensorRT engines: execution contexts, their buffers, their CUDA graphs and the times of their parts."""
