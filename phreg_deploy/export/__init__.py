"""A student, or any supported timm ViT -> a bundle.

Needs the extra ``export`` (torch, timm, onnx, onnxscript).
"""

from phreg_deploy.errors import missing_extra

try:
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401
except ImportError as error:
    raise missing_extra(error.name or "onnx", "export", "phreg_deploy.export") from error
