"""Find register neurons: the MLP hidden units that make the outlier tokens of a model.

The residual stream is a sum, so what sets an outlier token apart from ordinary tokens is the sum of what every hidden
unit and attention head wrote there beyond its mean on ordinary tokens. Units are ranked by their mean share of that
deviation, and taken from the largest on until zeroing them removes the outliers, no more. A unit that only reads what
an earlier one wrote falls silent with it, and is dropped. No layer, count or threshold is given per model.

Register neurons are those of arXiv 2506.08010, whose ranking by activation needs the layers and the count. That outlier
tokens share a direction is from SINDER, arXiv 2407.16826. B batch, N patch tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from phreg_deploy.artifacts.outliers import LEAST_RATE, NormBand, clearest_block
from phreg_deploy.distill.neurons.contributions import Contributions, HeadShare
from phreg_deploy.distill.neurons.neuron import RegisterNeuron
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT
from phreg_deploy.progress import Advance

# Least activation where a unit makes outliers, in activations on ordinary tokens.
SELECTIVITY = 5.0
# Zeroing the register neurons leaves at most this share of the outlier tokens.
REMAINING = 0.02
# If no set of units leaves less than this share, units do not make the outliers.
MADE_ELSEWHERE = 0.5
# Most units, the largest shares; DINOv2-L has 45 (arXiv 2506.08010).
MOST = 64
# Least share of an attention head that is reported.
FAIR_SHARE = 0.02


@dataclass
class NeuronSearch:
    """The outlier tokens of a model, and what makes them.

    ``rate``: share of patch tokens that are outliers after ``block``, where they stand out most; 0 if there are none.
    ``remaining``: the same with ``neurons`` zeroed. ``neurons``: sorted by block and unit. ``heads``: attention heads
    with a fair share, the largest first.
    """

    rate: float
    block: int
    remaining: float
    block_largest: list[float]
    neurons: list[RegisterNeuron] = field(default_factory=list)
    heads: list[HeadShare] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The result in one or two sentences."""
        if self.rate == 0:
            return "No outlier patch tokens: this model has no register neurons. Registers start at random."
        outliers = f"{self.rate:.2%} of patch tokens are outliers after block {self.block}"
        if not self.neurons:
            return f"{outliers}, but zeroing MLP units does not remove them. Registers start at random."
        first, count = max(self.neurons, key=lambda n: n.share), len(self.neurons)
        return (
            f"{outliers}, and {self.remaining:.2%} with {count} register neuron{'s' * (count > 1)} zeroed. The "
            f"strongest is unit {first.unit} of block {first.block}: it writes {first.share:.0%} of what sets outliers "
            f"apart. Its activation is {first.activation:.3g} on outliers and {first.elsewhere:.3g} on other tokens."
        )


def find_register_neurons(
    model: ViT, batches: Iterable[torch.Tensor], advance: Advance = lambda _n: None
) -> NeuronSearch:
    """Search every block of ``model`` for register neurons.

    Args:
        batches: normalised images, each ``(B, 3, H, W)``; a hundred images in all are enough. They are iterated three
            times, and once more for each set of units that is tried.
        advance: called with the number of images of the first three passes.
    """
    with torch.inference_mode():
        norms = _block_norms(model, batches, range(len(model.blocks)), advance)
        block = clearest_block(norms)
        band = NormBand.of(norms[block])
        outliers = band.outside(norms[block])
        rate = float(outliers.mean())
        largest = [float(n.max() / np.median(n)) for n in norms]
        if rate < LEAST_RATE:
            return NeuronSearch(0.0, block, 0.0, largest)
        shares = Contributions(model, block)
        for add in (shares.add_ordinary, shares.add_outliers):
            for batch, mask in _with_masks(batches, outliers):
                add(batch, mask)
                advance(len(batch))
        units = [unit for unit in shares.units() if abs(unit.activation) >= SELECTIVITY * unit.elsewhere]

        def remaining(neurons: Sequence[RegisterNeuron]) -> float:
            with _zeroed(model, neurons):
                return float(band.outside(_block_norms(model, batches, [block])[0]).mean())

        neurons, left = _necessary(units[:MOST], remaining, rate)
        ordered = sorted(neurons, key=lambda n: (n.block, n.unit))
        return NeuronSearch(rate, block, left, largest, ordered, [h for h in shares.heads() if h.share >= FAIR_SHARE])


def _necessary(
    candidates: list[RegisterNeuron], remaining: Callable[[Sequence[RegisterNeuron]], float], rate: float
) -> tuple[list[RegisterNeuron], float]:
    """The first candidates that remove the outliers together, without those that are not needed; and what remains."""
    left = remaining(candidates) if candidates else rate
    if left > MADE_ELSEWHERE * rate:
        return [], rate
    bar = max(REMAINING * rate, left)
    low, high = 0, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if remaining(candidates[:middle]) <= bar else (middle, high)
    neurons = candidates[:high]
    # The deepest first: what only reads earlier units is deeper than they are.
    for neuron in sorted(neurons, key=lambda n: (-n.block, n.share)):
        others = [n for n in neurons if n is not neuron]
        if others and remaining(others) <= bar:
            neurons = others
    return neurons, remaining(neurons)


def _with_masks(batches: Iterable[torch.Tensor], outliers: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each batch with its rows of ``outliers`` ``(B, N)``, which covers all images."""
    start = 0
    for batch in batches:
        yield batch, torch.from_numpy(outliers[start : start + len(batch)]).to(batch.device)
        start += len(batch)


def _block_norms(
    model: ViT, batches: Iterable[torch.Tensor], blocks: Sequence[int], advance: Advance = lambda _n: None
) -> list[np.ndarray]:
    """Norms ``(B, N)`` of the patch tokens of all images after each of ``blocks``."""
    prefix = model.num_prefix_tokens
    parts: dict[int, list[np.ndarray]] = {i: [] for i in blocks}

    def add(i: int, out: torch.Tensor) -> None:
        if i in parts:
            parts[i].append(out[:, prefix:].float().norm(dim=-1).cpu().numpy())

    with hooks.block_outputs(model, add):
        for batch in batches:
            hooks.forward(model, batch)
            advance(len(batch))
    return [np.concatenate(parts[i]) for i in blocks]


@contextmanager
def _zeroed(model: ViT, neurons: Iterable[RegisterNeuron]) -> Iterator[None]:
    """While open, the units write nothing."""
    weights = [(model.blocks[n.block].mlp.fc2.weight, n.unit) for n in neurons]
    columns = [weight[:, unit].clone() for weight, unit in weights]
    try:
        for weight, unit in weights:
            weight[:, unit] = 0
        yield
    finally:
        for (weight, unit), column in zip(weights, columns):
            weight[:, unit] = column
