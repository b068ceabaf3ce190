"""Put a fake GPU and a fake TensorRT where the project looks for them."""

import sys

import phreg_deploy.runtime.gpu.cuda as cuda


def install(monkeypatch, device, workshop=None):
    """Put a device, and a TensorRT where one is given, where the project looks for them."""
    monkeypatch.setattr(cuda, "_load", lambda: device.runtime)
    if workshop is not None:
        monkeypatch.setitem(sys.modules, "tensorrt", workshop.tensorrt)
