"""Imported before what an exporter needs, to say in words which of it is not there."""

from importlib.util import find_spec

from phreg_deploy.errors import missing_extra

for module in ("onnx", "onnxscript", "safetensors", "timm", "torch"):
    if find_spec(module) is None:
        raise missing_extra(module, "export", "phreg_deploy.export")

import phreg_deploy.distill  # noqa: E402, F401  (says what is wrong where torch is there and broken)
