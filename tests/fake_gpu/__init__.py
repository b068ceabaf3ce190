"""A fake GPU and a fake TensorRT: every call that this project makes of both, recorded, with NVIDIA's refusals.

Work is queued as on a real device and only done when somebody waits for it, so a forgotten wait shows in the answers. The
engine really computes, on the processor, with ONNX Runtime. The fakes have no public name that NVIDIA does not have;
``test_tensorrt_runtime.py`` checks this. What tests turn and read is in ``Device`` and ``Workshop``.
"""

from tests.fake_gpu.cuda import Runtime
from tests.fake_gpu.cuda_types import cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
from tests.fake_gpu.device import Array, Device
from tests.fake_gpu.install import install
from tests.fake_gpu.onnx_file import read_nodes
from tests.fake_gpu.tensorrt import Workshop, public_names

__all__ = [
    "Array",
    "Device",
    "Runtime",
    "Workshop",
    "cudaError_t",
    "cudaMemcpyKind",
    "cudaStreamCaptureMode",
    "install",
    "public_names",
    "read_nodes",
]
