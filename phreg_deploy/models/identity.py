"""Identify what a model computes, as the key of cached teacher targets and of resumed runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import model_arguments
from phreg_deploy.models.weights import weights_digest
from phreg_deploy.spec import Stored


@dataclass(frozen=True)
class ModelIdentity(Stored):
    """Everything that decides a model's features for given pixels.

    The weights alone do not decide them: another activation or number of heads gives other features. ``modules``:
    digest of the module tree with its settings, such as activations and epsilons. ``image_size``: (height, width).
    """

    architecture: str
    arguments: dict[str, str]
    heads: list[int]
    modules: str
    image_size: list[int]
    weights: str


def model_identity(model: ViT) -> ModelIdentity:
    """Identify a model. Reads every weight."""
    return ModelIdentity(
        architecture=str(model.pretrained_cfg.get("architecture")),
        arguments={k: getattr(v, "__qualname__", repr(v)) for k, v in sorted(model_arguments(model).items())},
        heads=[block.attn.num_heads for block in model.blocks],
        modules=hashlib.sha256(repr(model).encode()).hexdigest(),
        image_size=list(model.patch_embed.img_size),
        weights=weights_digest(model),
    )
