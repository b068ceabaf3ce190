"""Finding register neurons: MLP hidden units that fire enormously on outlier tokens and nowhere else.

Algorithm 1 of arXiv 2506.08010, made automatic: activation on outlier tokens times the norm of the unit's ``fc2``
column is how much norm the unit writes; a register neuron writes at least a fair share of an ordinary token's norm
there, and next to nothing on ordinary tokens. No layer, count or threshold has to be given per model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from phreg_deploy.artifacts.measures import OUTLIER_FACTOR
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT

SHARE = 0.75  # norm that a register neuron writes on outliers, at least, in median norms of its block's output
SELECTIVITY = 10.0  # its activation on outliers, at least, in activations on ordinary tokens
MOST = 64  # units at most, the strongest first; DINOv2-L has 45 (arXiv 2506.08010)


@dataclass(frozen=True)
class RegisterNeuron:
    """Hidden unit ``unit`` of block ``block``; ``activation`` its signed mean on outlier tokens, ``elsewhere`` on others.

    ``share``: the norm that it writes on outlier tokens, in median norms of its block's output.
    """

    block: int
    unit: int
    activation: float
    elsewhere: float
    share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Survey:
    """Where the outlier tokens are and what makes them.

    ``rate``: share of patch tokens above ``OUTLIER_FACTOR`` times the median pre-norm norm; ``block_largest``: largest
    over median norm per block; ``neurons`` in the order of their blocks.
    """

    rate: float
    median: float
    block_largest: list[float]
    neurons: list[RegisterNeuron]

    @property
    def word(self) -> str:
        """What was found, for people."""
        if self.rate == 0:
            return "No high-norm patch tokens: this model has no register neurons. Registers start at random."
        if not self.neurons:
            return f"{self.rate:.2%} of patch tokens are high-norm, but no single MLP unit makes them. Registers start at random."
        first = max(self.neurons, key=lambda n: n.share)
        return (
            f"{self.rate:.2%} of patch tokens are high-norm. {len(self.neurons)} register neuron{'s' * (len(self.neurons) > 1)} found; the strongest "
            f"is unit {first.unit} of block {first.block} ({abs(first.activation):.0f} on outliers, {first.elsewhere:.3g} elsewhere)."
        )


@torch.inference_mode()
def survey(model: ViT, batches: Iterable[torch.Tensor], advance: Callable[[int], None] = lambda _n: None) -> Survey:
    """Search every block of ``model`` for register neurons.

    Args:
        batches: normalised images, each ``(B, 3, H, W)``, iterated twice; 256 images in all are plenty.
        advance: called with the number of images done; every image passes twice.
    """
    prefix, depth = model.num_prefix_tokens, len(model.blocks)
    norms: list[np.ndarray] = []
    per_block: list[list[np.ndarray]] = [[] for _ in range(depth)]

    def keep(i: int, out: torch.Tensor) -> None:
        per_block[i].append(out[:, prefix:].float().norm(dim=-1).cpu().numpy())

    for batch in batches:
        with hooks.block_outputs(model, keep):
            norms.append(hooks.forward(model, batch).norms.cpu().numpy())
        advance(len(batch))
    median = float(np.median(np.concatenate(norms)))
    medians = [float(np.median(np.concatenate(block))) for block in per_block]
    largest = [float(np.concatenate(block).max() / m) for block, m in zip(per_block, medians)]
    masks = [n > OUTLIER_FACTOR * median for n in norms]
    count = sum(int(m.sum()) for m in masks)
    total = sum(m.size for m in masks)
    if count == 0:
        return Survey(0.0, median, largest, [])

    # rows: signed, outliers, others; what ``fc2`` sees on outliers and on others, where a norm stands before it
    sums = [torch.zeros(5, hidden_width(block.mlp)) for block in model.blocks]

    for batch, mask in zip(batches, masks):
        where = torch.from_numpy(mask)

        def add(i: int, hidden: torch.Tensor, where: torch.Tensor = where) -> None:
            h = hidden[:, prefix:].float().cpu()
            sums[i][0] += h[where].sum(0)
            sums[i][1] += h[where].abs().sum(0)
            sums[i][2] += h[~where].abs().sum(0)
            inner = hooks.inner_norm(model.blocks[i].mlp)
            if inner is not None:
                n = inner.forward(hidden[:, prefix:]).float().cpu()  # not called: its hook is this one
                sums[i][3] += n[where].sum(0)
                sums[i][4] += n[~where].sum(0)

        with hooks.hidden_units(model, add):
            hooks.forward(model, batch)
        advance(len(batch))

    found = []
    for i, block in enumerate(model.blocks):
        signed, on, off = sums[i][0] / count, sums[i][1] / count, sums[i][2] / max(1, total - count)
        written = on
        if (
            hooks.inner_norm(block.mlp) is not None
        ):  # the norm bounds what a unit writes, and gives every unit an offset
            written = (sums[i][3] / count - sums[i][4] / max(1, total - count)).abs()
        share = written * written_norm(block).cpu() / medians[i]
        chosen = (share >= SHARE) & (on >= SELECTIVITY * off)
        found += [
            RegisterNeuron(i, int(u), float(signed[u]), float(off[u]), float(share[u]))
            for u in chosen.nonzero().flatten()
        ]
    strongest = sorted(found, key=lambda n: -n.share)[:MOST]
    return Survey(count / total, median, largest, sorted(strongest, key=lambda n: (n.block, n.unit)))


def hidden_width(mlp: ViT) -> int:
    return int(mlp.fc2.in_features)


def written_norm(block: ViT) -> torch.Tensor:
    """Norm that one unit of activation writes into the residual stream, ``(H,)``; LayerScale included."""
    scale = getattr(getattr(block, "ls2", None), "gamma", None)
    scale = getattr(block, "gamma_2", None) if scale is None else scale
    weight = block.mlp.fc2.weight.detach()
    return (weight if scale is None else weight * scale.detach()[:, None]).norm(dim=0)
