"""An FP32 bundle and images -> a bundle in fewer bits whose features can be trusted, with the evidence in it. No PyTorch."""

from phreg_deploy.extras import require

require(
    "phreg_deploy.calibration", calibration=("ml_dtypes", "onnx")
)  # onnxruntime by session.py: exporters narrow without
