"""An FP32 bundle and images -> an INT8 bundle whose features can be trusted, with the evidence in it. No PyTorch."""

import importlib.util

from phreg_deploy.errors import missing_extra

for module, extra in (("onnx", "calibration"), ("onnxruntime", "cpu")):
    if importlib.util.find_spec(module) is None:
        raise missing_extra(module, extra, "phreg_deploy.calibration")
