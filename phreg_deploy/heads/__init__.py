"""Linear heads on dense features: class scores or depth per patch. Reading and computing need numpy, not PyTorch."""

from phreg_deploy.heads.head import Head

__all__ = ["Head"]
