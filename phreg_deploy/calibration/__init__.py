"""An FP32 bundle and images -> a bundle in fewer bits whose features can be trusted, with the evidence in it. No PyTorch."""

import importlib.util

from phreg_deploy.errors import missing_extra

for module in ("onnx", "ml_dtypes"):
    if importlib.util.find_spec(module) is None:
        raise missing_extra(module, "calibration", "phreg_deploy.calibration")
