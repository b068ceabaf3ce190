"""What a model computes, in a form that can be compared and stored: the key of cached targets and of resumed runs."""

from __future__ import annotations

import hashlib
from typing import Any

from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import model_arguments
from phreg_deploy.models.weights import weights_digest


def model_identity(model: ViT) -> dict[str, Any]:
    """Everything that decides a model's features for given pixels.

    Weights alone do not: the same ones compute something else with another activation or number of heads.
    ``modules``: a digest of the tree of modules with their settings, activations and epsilons among them.
    """
    arguments = {k: getattr(v, "__qualname__", repr(v)) for k, v in sorted(model_arguments(model).items())}
    return {
        "architecture": str(model.pretrained_cfg.get("architecture")),
        "arguments": arguments,
        "heads": [block.attn.num_heads for block in model.blocks],
        "modules": hashlib.sha256(repr(model).encode()).hexdigest(),
        "image_size": list(model.patch_embed.img_size),
        "weights": weights_digest(model),
    }
