"""A timm ViT and a folder of images -> a registered student, itself a standard timm checkpoint.

Needs the extra ``distill`` (torch, timm, safetensors).
"""

import phreg_deploy.models  # noqa: F401  (says which packages are missing or broken)
