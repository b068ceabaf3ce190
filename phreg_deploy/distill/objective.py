"""What a student is trained for: the loss on patch tokens, the class token and token norms. B batch, N patch tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from phreg_deploy.artifacts.outliers import NormBand
from phreg_deploy.distill.recipes import Recipe
from phreg_deploy.distill.teacher import TargetCache
from phreg_deploy.models import hooks

# Spreads within which a token's norm costs nothing; a normal distribution holds 99.7 % of its tokens there.
NORM_REACH = 3.0


@dataclass
class MicroBatch:
    """The images of one forward and backward pass; fields as in ``Batch``.

    ``weight`` ``(B, N)``: of each patch token, with a mean of 1 over the whole batch. ``share``: of the batch's images.
    """

    images: torch.Tensor
    patches: torch.Tensor
    cls: torch.Tensor | None
    weight: torch.Tensor
    share: float
    layers: torch.Tensor | None = None

    def to(self, device: str) -> MicroBatch:
        """Move to ``device`` at once, with targets in float32; from page-locked memory, the host does not wait."""
        images, patches, weight = (x.to(device, non_blocking=True) for x in (self.images, self.patches, self.weight))
        cls = None if self.cls is None else self.cls.to(device, non_blocking=True).float()
        layers = None if self.layers is None else self.layers.to(device, non_blocking=True).float()
        return MicroBatch(images, patches.float(), cls, weight, self.share, layers)


@dataclass
class TargetScale:
    """Variances of the targets, by which squared errors are divided; and where the base model's token norms lie.

    ``layers``: the variance of each further layer.
    """

    patches: float = 1.0
    cls: float = 1.0
    norms: NormBand | None = None
    layers: tuple[float, ...] = ()


def objective(features: hooks.Features, part: MicroBatch, recipe: Recipe, scale: TargetScale) -> torch.Tensor:
    """What a part adds to its batch's loss: (1 - cos) + MSE on patch tokens (arXiv 2505.21501 section 3.2).

    The same on the class token, the mean of the same over further layers, and a term on token norms, are added if the
    recipe has them. ``part`` is on the device of ``features``.
    """
    loss = _distance(features.patches.float(), part.patches, part.weight, scale.patches)
    if recipe.class_weight and features.cls is not None and part.cls is not None:
        one = torch.ones(len(part.images), device=part.images.device)
        loss = loss + recipe.class_weight * _distance(features.cls.float(), part.cls, one, scale.cls)
    if part.layers is not None:
        pairs = zip(features.layers, part.layers.unbind(1), scale.layers)
        distances = [_distance(x.float(), target, part.weight, variance) for x, target, variance in pairs]
        loss = loss + recipe.layer_weight * torch.stack(distances).mean()
    if recipe.norm_weight and scale.norms is not None:
        loss = loss + recipe.norm_weight * norm_excess(features.norms, scale.norms)
    return loss * part.share


def norm_excess(norms: torch.Tensor, band: NormBand) -> torch.Tensor:
    """Mean squared distance of pre-norm token norms ``(B, N)`` to the ``band`` of ordinary ones, in spreads.

    The final norm hides a token's length from the other terms. Tokens within ``NORM_REACH`` spreads cost nothing. The
    term is ours.
    """
    deviations = (norms.clamp(min=1e-6).log() - math.log(band.median)) / band.spread
    return (deviations.abs() - NORM_REACH).clamp(min=0).square().mean()


def _distance(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, variance: float) -> torch.Tensor:
    cosine = 1 - F.cosine_similarity(x, target, dim=-1)
    return (weight * cosine).mean() + (weight * (x - target).square().mean(-1)).mean() / variance


def target_scale(cache: TargetCache, digests: list[str], recipe: Recipe, most: int = 64) -> TargetScale:
    """Measure the scale of a sample of targets; the variances stay 1 unless the recipe is scale-free.

    Variances are over images and positions, averaged over channels.
    """
    items = [cache.read(d) for d in digests[:: max(1, len(digests) // most)]]
    band = NormBand.of(np.stack([item["norms"] for item in items]))
    if not recipe.scale_free:
        return TargetScale(norms=band, layers=(1.0,) * len(recipe.layers))
    patches = np.concatenate([item["patches"].astype(np.float32) for item in items])
    cls = np.stack([item["cls"].astype(np.float32) for item in items])
    class_variance = (float(cls.var(0).mean()) or 1.0) if cls.size else 1.0
    layers = []
    for i in range(len(recipe.layers)):
        of_layer = np.stack([item["layers"][i].astype(np.float32) for item in items])
        layers.append(float(of_layer.reshape(-1, of_layer.shape[-1]).var(0).mean()) or 1.0)
    return TargetScale(float(patches.var(0).mean()) or 1.0, class_variance, band, tuple(layers))
