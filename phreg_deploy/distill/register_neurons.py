"""Find register neurons: MLP hidden units that fire strongly on outlier tokens and nowhere else.

Algorithm 1 of arXiv 2506.08010, made automatic. A unit writes the norm of its ``fc2`` column times its activation. A
register neuron writes at least ``SHARE`` of an ordinary token's norm on outlier tokens, and almost nothing elsewhere.
No layer, count or threshold has to be given per model. B batch, N patch tokens, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from phreg_deploy.artifacts.measures import OUTLIER_FACTOR
from phreg_deploy.distill.record import RegisterNeuron
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT

# Least norm that a register neuron writes on outlier tokens, in median norms of its block's output.
SHARE = 0.75
# Least activation on outlier tokens, in activations on ordinary tokens.
SELECTIVITY = 10.0
# Most units, the strongest ones; DINOv2-L has 45 (arXiv 2506.08010).
MOST = 64


@dataclass
class NeuronSearch:
    """The outlier tokens of a model and the units that make them.

    ``rate``: share of patch tokens above ``OUTLIER_FACTOR`` times the ``median`` pre-norm norm. ``block_largest``:
    largest norm over median norm, per block. ``neurons``: sorted by block and unit.
    """

    rate: float
    median: float
    block_largest: list[float]
    neurons: list[RegisterNeuron]

    @property
    def summary(self) -> str:
        """The result as a sentence."""
        if self.rate == 0:
            return "No high-norm patch tokens: this model has no register neurons. Registers start at random."
        high = f"{self.rate:.2%} of patch tokens are high-norm"
        if not self.neurons:
            return f"{high}, but no single MLP unit makes them. Registers start at random."
        first, count = max(self.neurons, key=lambda n: n.share), len(self.neurons)
        return (
            f"{high}. {count} register neuron{'s' * (count > 1)} found; the strongest is unit {first.unit} of block "
            f"{first.block} ({abs(first.activation):.0f} on outliers, {first.elsewhere:.3g} elsewhere)."
        )


@torch.inference_mode()
def find_register_neurons(
    model: ViT, batches: Iterable[torch.Tensor], advance: Callable[[int], None] = lambda _n: None
) -> NeuronSearch:
    """Search every block of ``model`` for register neurons.

    Args:
        batches: normalised images, each ``(B, 3, H, W)``, iterated twice; 256 images in all are enough.
        advance: called with the number of images done; every image counts twice.
    """
    norms, block_norms = _patch_norms(model, batches, advance)
    median = float(np.median(np.concatenate(norms)))
    medians = [float(np.median(block)) for block in block_norms]
    largest = [float(block.max() / m) for block, m in zip(block_norms, medians)]
    masks = [n > OUTLIER_FACTOR * median for n in norms]
    rate = float(np.concatenate([mask.ravel() for mask in masks]).mean())
    if rate == 0:
        return NeuronSearch(0.0, median, largest, [])
    activations = _mean_activations(model, batches, masks, advance)
    neurons = [n for i, block_median in enumerate(medians) for n in _select(model, i, activations[i], block_median)]
    strongest = sorted(neurons, key=lambda n: -n.share)[:MOST]
    return NeuronSearch(rate, median, largest, sorted(strongest, key=lambda n: (n.block, n.unit)))


def _patch_norms(
    model: ViT, batches: Iterable[torch.Tensor], advance: Callable[[int], None]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Pre-norm norms of patch tokens, ``(B, N)`` per batch; and norms after each block, ``(M, N)`` per block."""
    prefix = model.num_prefix_tokens
    norms: list[np.ndarray] = []
    per_block: list[list[np.ndarray]] = [[] for _ in model.blocks]

    def add(i: int, out: torch.Tensor) -> None:
        per_block[i].append(out[:, prefix:].float().norm(dim=-1).cpu().numpy())

    with hooks.block_outputs(model, add):
        for batch in batches:
            norms.append(hooks.forward(model, batch).norms.cpu().numpy())
            advance(len(batch))
    return norms, [np.concatenate(block) for block in per_block]


@dataclass
class _Activations:
    """Means over tokens of each hidden unit of one block, all ``(H,)``.

    ``signed``, ``magnitude``: on outlier tokens. ``elsewhere``: magnitude on other patch tokens. ``normed``: outlier
    mean minus ordinary mean behind the MLP's inner norm; zeros if there is none.
    """

    signed: torch.Tensor
    magnitude: torch.Tensor
    elsewhere: torch.Tensor
    normed: torch.Tensor


def _mean_activations(
    model: ViT, batches: Iterable[torch.Tensor], masks: list[np.ndarray], advance: Callable[[int], None]
) -> list[_Activations]:
    """Mean activations of every block; ``masks``: outlier tokens, bool ``(B, N)`` per batch."""
    prefix = model.num_prefix_tokens
    count = sum(int(mask.sum()) for mask in masks)
    others = max(1, sum(mask.size for mask in masks) - count)
    sums = [_Activations(*torch.zeros(4, block.mlp.fc2.in_features)) for block in model.blocks]
    for batch, mask in zip(batches, masks):
        outliers = torch.from_numpy(mask)

        def add(i: int, hidden: torch.Tensor, outliers: torch.Tensor = outliers) -> None:
            h = hidden[:, prefix:].float().cpu()
            sums[i].signed += h[outliers].sum(0) / count
            sums[i].magnitude += h[outliers].abs().sum(0) / count
            sums[i].elsewhere += h[~outliers].abs().sum(0) / others
            inner = hooks.inner_norm(model.blocks[i].mlp)
            if inner is not None:
                # ``forward``, since a call would run the hook that calls this function.
                n = inner.forward(hidden[:, prefix:]).float().cpu()
                sums[i].normed += n[outliers].sum(0) / count - n[~outliers].sum(0) / others

        with hooks.hidden_units(model, add):
            hooks.forward(model, batch)
        advance(len(batch))
    return sums


def _select(model: ViT, index: int, activations: _Activations, median: float) -> list[RegisterNeuron]:
    """The register neurons of one block, whose output has this ``median`` norm."""
    block = model.blocks[index]
    written = activations.magnitude
    # An inner norm bounds what a unit writes, and gives every unit an offset.
    if hooks.inner_norm(block.mlp) is not None:
        written = activations.normed.abs()
    share = written * written_norm(block).cpu() / median
    selected = (share >= SHARE) & (activations.magnitude >= SELECTIVITY * activations.elsewhere)
    return [
        RegisterNeuron(index, int(u), float(activations.signed[u]), float(activations.elsewhere[u]), float(share[u]))
        for u in selected.nonzero().flatten()
    ]


def written_norm(block: ViT) -> torch.Tensor:
    """Norm that a unit writes into the residual stream per activation of 1, ``(H,)``; includes LayerScale."""
    scale = getattr(getattr(block, "ls2", None), "gamma", None)
    scale = getattr(block, "gamma_2", None) if scale is None else scale
    weight = block.mlp.fc2.weight.detach()
    return (weight if scale is None else weight * scale.detach()[:, None]).norm(dim=0)
