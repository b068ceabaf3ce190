"""Moving register neurons from patch tokens to a register token, in closed form and without a gradient.

Each register neuron's ``fc1`` row becomes the direction that best separates the register's normalised input from every
patch's and class token's (linear discriminant with a ridge); its bias puts those deep in the activation's zero, and the
register at a chosen strength. Its ``fc2`` column stays. Ours; the neurons are those of arXiv 2506.08010, which moves
their activations at run time instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

import torch

from phreg_deploy.distill.register_neurons import RegisterNeuron
from phreg_deploy.errors import PhregError
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT

RIDGE = 0.05  # of the mean variance
QUANTILE = 0.9999  # of the other tokens, put at the activation's zero
FLAT = 1.5e-4  # an activation counts as zero where it and everything below it is at most this; GELU from -4 down
DEEPEST = -32.0  # where the search for that ends
LEAST_GAP = (
    0.01  # between the quantile of the others and the register, in distances between the two means. The demo model is
)
# moved well at .02 (outliers 1.95 % -> 0), ViT-Tiny has .48 and .50.
STRENGTH = 0.07  # of the outliers' activation: the next norm sees a direction only (benchmarks/README.md)
SAMPLES = 65536  # rows kept for the quantile


@torch.no_grad()
def transplant(
    student: ViT,
    neurons: list[RegisterNeuron],
    batches: Iterable[torch.Tensor],
    *,
    strength: float = STRENGTH,
    advance: Callable[[int], None] = lambda _n: None,
) -> dict[RegisterNeuron, str]:
    """Rewrite ``neurons`` in place so that they fire for the student's first register token only.

    Args:
        student: a model with at least one register token.
        neurons: of the base model; rewritten block by block from the shallowest, since each changes what follows.
        batches: normalised images ``(B, 3, H, W)``, a few hundred in all; iterated once for each block.
        strength: activation at the register, in activations that the outlier tokens had.

    Returns:
        The neurons that were left as they are, and why.

    Raises:
        PhregError: none of the neurons can be moved.
    """
    sink = int(student.cls_token is not None)
    left: dict[RegisterNeuron, str] = {}
    for index, group in groupby(sorted(neurons, key=lambda n: n.block), key=lambda n: n.block):
        mlp, units = student.blocks[index].mlp, list(group)
        reason = unmovable(mlp)
        if reason is None:
            at_sink, centre, covariance, others = _statistics(student, index, batches, sink, advance)
            ridge = RIDGE * covariance.diagonal().mean()
            apart = at_sink - centre
            direction = torch.linalg.solve(covariance + ridge * torch.eye(len(centre), dtype=centre.dtype), apart)
            direction = direction / (direction @ apart)  # the register sits at 1 above the others' mean
            rest = float(((others - centre) @ direction).quantile(QUANTILE))
            if not rest <= 1 - LEAST_GAP:
                reason = (
                    f"its input does not tell the register from other tokens: their {QUANTILE} quantile lies at {rest:.2f} of the way "
                    f"from their mean to the register, expected at most {1 - LEAST_GAP:.2f}"
                )
        if reason is not None:
            left.update((unit, reason) for unit in units)
            continue
        for unit in units:
            _rewrite(mlp, unit, direction, centre, rest, strength)
    if neurons and len(left) == len(neurons):
        first = min(left, key=lambda n: n.block)
        raise PhregError(
            f"transplant: none of the {len(left)} register neurons can be moved; unit {first.unit} of block {first.block}: {left[first]}. "
            "Distil with --recipe random-registers."
        )
    return left


def unmovable(mlp: ViT) -> str | None:
    """Why units of this MLP cannot be rewritten, or None."""
    if any(layer.bias is None for layer in (mlp.fc1_g, mlp.fc1_x)) if hasattr(mlp, "fc1_g") else mlp.fc1.bias is None:
        return "its MLP has no bias, so nothing can hold the unit at zero for the other tokens"
    if zero_below(mlp.act) is None:
        return f"its activation {type(mlp.act).__name__} does not go to zero for negative inputs"
    return None


def zero_below(activation: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
    """The largest input, in steps of 1/8, at and below which the activation is zero to ``FLAT``; None where it is not."""
    points = torch.arange(0, DEEPEST - 0.125, -0.125, dtype=torch.float64)
    flat = activation(points.clone()).abs() <= FLAT
    last = int((~flat).nonzero().max()) if not flat.all() else -1
    return None if last == len(points) - 1 else float(points[last + 1])


@torch.no_grad()
def silence(student: ViT, neurons: list[RegisterNeuron]) -> None:
    """The control without registers: the same units never fire again."""
    for neuron in neurons:
        student.blocks[neuron.block].mlp.fc2.weight[:, neuron.unit] = 0


class _Sample:
    """A uniform sample of rows in bounded memory: the rows with the smallest of seeded random keys."""

    def __init__(self, width: int, most: int) -> None:
        self.rows, self.keys, self.most = torch.empty(0, width), torch.empty(0), most
        self.generator = torch.Generator().manual_seed(0)

    def add(self, rows: torch.Tensor) -> None:
        keys = torch.rand(len(rows), generator=self.generator)
        if len(self.rows) == self.most:
            rows, keys = rows[keys < self.keys.max()], keys[keys < self.keys.max()]
        self.rows, self.keys = torch.cat([self.rows, rows]), torch.cat([self.keys, keys])
        if len(self.rows) > self.most:
            kept = self.keys.topk(self.most, largest=False).indices
            self.rows, self.keys = self.rows[kept], self.keys[kept]


def _statistics(
    student: ViT, index: int, batches: Iterable[torch.Tensor], sink: int, advance: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the MLP's inputs in one block: mean at the register; mean, covariance and a sample over the other tokens.

    Other registers are left out: they may fire as well. All in float64.
    """
    width, start = student.embed_dim, student.num_prefix_tokens
    total, square, at_sink = (torch.zeros(s, dtype=torch.float64) for s in ((width,), (width, width), (width,)))
    count, images, sample = 0, 0, _Sample(width, SAMPLES)

    def see(_module: ViT, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal count, images
        z = inputs[0].detach().float().cpu()  # (B, T, C)
        rows = torch.cat([z[:, :sink], z[:, start:]], dim=1).reshape(-1, width)
        sample.add(rows)
        others = rows.double()
        at_sink.add_(z[:, sink].double().sum(0))
        total.add_(others.sum(0))
        square.add_(others.T @ others)
        count, images = count + len(others), images + len(z)

    handle = student.blocks[index].mlp.register_forward_pre_hook(see)
    try:
        for batch in batches:
            hooks.forward(student, batch)
            advance(len(batch))
    finally:
        handle.remove()
    centre = total / count
    return at_sink / images, centre, square / count - torch.outer(centre, centre), sample.rows.double()


def _rewrite(
    mlp: ViT, neuron: RegisterNeuron, direction: torch.Tensor, centre: torch.Tensor, rest: float, strength: float
) -> None:
    """Pre-activation = gain * direction.(z - centre) + offset: ``level`` at the register, the activation's zero at ``rest``."""
    wanted = strength * neuron.activation
    gate, value = _rows(mlp, neuron.unit)
    level = wanted if value is None else max(abs(wanted), 4.0)  # a gated unit's gate only has to be open
    if (
        value is None and level <= 0
    ):  # GELU and its kin have no negative side to speak of: write the mirror image instead
        level = abs(wanted)
        mlp.fc2.weight[:, neuron.unit] *= -1
    zero = zero_below(mlp.act)
    assert zero is not None  # ``unmovable`` has looked
    gain = (level - zero) / (1.0 - rest)
    offset = level - gain
    weight, bias = gate
    weight.copy_((gain * direction).to(weight))
    bias.copy_(torch.as_tensor(offset - gain * float(direction @ centre)).to(bias))
    if value is not None:
        weight, bias = value
        weight.zero_()
        bias.copy_(torch.as_tensor(wanted / float(mlp.act(torch.tensor(level)))).to(bias))


def _rows(mlp: ViT, unit: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
    """(weight row, bias) of the unit's gate, and of its value where the MLP is gated."""
    if hasattr(mlp, "fc1_g"):
        return (mlp.fc1_g.weight[unit], mlp.fc1_g.bias[unit]), (mlp.fc1_x.weight[unit], mlp.fc1_x.bias[unit])
    first = (mlp.fc1.weight[unit], mlp.fc1.bias[unit])
    if not hasattr(mlp, "gate_last"):
        return first, None
    hidden = mlp.fc2.in_features
    second = (mlp.fc1.weight[unit + hidden], mlp.fc1.bias[unit + hidden])
    return (second, first) if mlp.gate_last else (first, second)
