"""Make the project use a fake GPU and a fake TensorRT."""

import sys

import phreg_deploy.runtime.gpu.cuda as cuda
import phreg_deploy.runtime.gpu_images.nvrtc as nvrtc
from tests.fake_gpu.kernels import FakeNvrtc


def install(monkeypatch, device, tensorrt=None):
    """Make the project use this device and, if given, this TensorRT."""
    monkeypatch.setattr(cuda, "_load", lambda: device.runtime)
    monkeypatch.setattr(cuda, "_load_driver", lambda: device.driver_api)
    monkeypatch.setattr(nvrtc, "_load", lambda: FakeNvrtc(device))
    if tensorrt is not None:
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt.module)
