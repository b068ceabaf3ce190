"""Make the project use a fake GPU and a fake TensorRT."""

import sys

import phreg_deploy.runtime.gpu.cuda as cuda


def install(monkeypatch, device, tensorrt=None):
    """Make the project use this device and, if given, this TensorRT."""
    monkeypatch.setattr(cuda, "_load", lambda: device.runtime)
    monkeypatch.setattr(cuda, "_load_driver", lambda: device.driver_api)
    if tensorrt is not None:
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt.module)
