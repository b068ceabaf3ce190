"""A fake GPU and a fake TensorRT: they record every call of this project, and refuse what NVIDIA's libraries refuse.

Work is queued as on a real device and computed only when a caller waits for it, so a missing wait gives wrong answers.
Whatever NVIDIA's documentation leaves open ("may synchronise") is taken in the way that hurts: it counts as a wait, and
orders nothing.
The engine computes on the processor with ONNX Runtime. The fakes have no public name that NVIDIA's libraries lack;
``test_fake_gpu.py`` checks this. Tests set and read the attributes of ``Device`` and ``FakeTensorRT``.
"""

from tests.fake_gpu.arrays import Array
from tests.fake_gpu.cuda import Driver, Runtime
from tests.fake_gpu.cuda_types import Event, Work, cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
from tests.fake_gpu.device import Device
from tests.fake_gpu.install import install
from tests.fake_gpu.onnx_file import read_nodes
from tests.fake_gpu.tensorrt import FakeTensorRT, public_names

__all__ = [
    "Array",
    "Device",
    "Driver",
    "Event",
    "FakeTensorRT",
    "Runtime",
    "Work",
    "cudaError_t",
    "cudaMemcpyKind",
    "cudaStreamCaptureMode",
    "install",
    "public_names",
    "read_nodes",
]
