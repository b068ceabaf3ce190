"""A fake CUDA device that copies at a known rate, a small model, and the metadata of TensorRT layers."""

from types import SimpleNamespace

from phreg_deploy.runtime.gpu.cuda import Gpu
from phreg_deploy.spec import ModelSpec

TINY = ModelSpec("tiny", "vit", (4, 4), (2, 2), 8, 3, 2, True, 1, 1000)


def layer_metadata(*nodes: str) -> str:
    """Write a layer's metadata as TensorRT does, from the names of its ONNX nodes."""
    return "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)


class FakeCuda:
    """A device that copies 100 GB/s, and 50 GB/s in its first 8 copies; other calls take no time."""

    gpu = Gpu(0, "Fake", 89, 1 << 30, 16, False, 13000)
    api, index, free_memory = SimpleNamespace(cudaStreamNonBlocking=1), 0, lambda self: (800 << 20, 1 << 30)

    def __init__(self):
        self.now, self.live, self.copied, self.marks = 0.0, 0, [], {}

    def copy(self, target, source, size, kind, stream):
        assert kind == "DeviceToDevice"
        self.copied.append(size)
        self.now += size / (100e9 if len(self.copied) > 8 else 50e9)

    def call(self, name, *arguments):
        self.live += name in ("cudaMalloc", "cudaStreamCreateWithFlags", "cudaEventCreate")
        self.live -= name in ("cudaFree", "cudaStreamDestroy", "cudaEventDestroy")
        if name == "cudaEventRecord":
            self.marks[int(arguments[0])] = self.now
        if name == "cudaEventElapsedTime":
            return 1e3 * (self.marks[int(arguments[1])] - self.marks[int(arguments[0])])
        return b"0:65:0.0\0  " if name == "cudaDeviceGetPCIBusId" else 7 + self.live
