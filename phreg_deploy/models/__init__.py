"""Load timm ViTs, hook into them, add register tokens to them, and write them as checkpoints.

Needs the extra ``distill`` (torch, timm, safetensors). Importing this module raises ``BackendMissing`` without it.
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
# timm cannot import a torchvision that was built against another torch.
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    raise BackendMissing(
        "timm cannot import torchvision: it was built against another build of torch (operator torchvision::nms does "
        "not exist). Run: pip install --force-reinstall torch torchvision, or install into a new environment with "
        'pip install "phreg-deploy[distill]"'
    ) from error
