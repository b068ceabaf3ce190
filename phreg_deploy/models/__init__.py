"""timm ViTs: loading them, reading them in the middle, adding register tokens, writing them as checkpoints.

Needs the extra ``distill`` (torch, timm, safetensors).
"""

from phreg_deploy.errors import BackendMissing
from phreg_deploy.extras import DISTILL, require

require("phreg_deploy.distill", distill=DISTILL)

try:
    import safetensors  # noqa: F401
    import timm  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise BackendMissing(
        f"phreg_deploy.distill: {error.name or 'torch'} cannot be imported ({error}). "
        'Run: pip install --force-reinstall "phreg-deploy[distill]"'
    ) from error
except RuntimeError as error:  # torchvision built against another torch: timm's own import of it fails
    if "torchvision::nms" not in str(error):
        raise
    raise BackendMissing(
        "timm cannot import torchvision: it was built against another build of torch (operator torchvision::nms does not exist). "
        'Run: pip install --force-reinstall torch torchvision, or install into a new environment with pip install "phreg-deploy[distill]"'
    ) from error
