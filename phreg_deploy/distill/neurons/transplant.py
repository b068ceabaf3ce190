"""Move register neurons from patch tokens to a register token, in closed form and without gradients.

The ``fc1`` row of each register neuron becomes the direction that best separates the register's normalised input from
that of all patch and class tokens (linear discriminant with a ridge). Its bias puts those tokens where the activation
is zero, and the register at a chosen strength. Its ``fc2`` column stays. The method is ours; the neurons are those of
arXiv 2506.08010, which moves their activations at run time instead. B batch, T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import torch

from phreg_deploy.distill.neurons.neuron import RegisterNeuron
from phreg_deploy.errors import PhregError
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT

# In units of the mean variance.
RIDGE = 0.05
# This quantile of the other tokens is put at the activation's zero.
QUANTILE = 0.9999
# An activation counts as zero where it, and everything below, is at most this: GELU from -4 down.
ZERO_TOLERANCE = 1.5e-4
# The search for an activation's zero ends here.
LOWEST_INPUT = -32.0
# Least gap between the quantile of the other tokens and the register, in distances between the two means. The demo's
# model is moved well at 0.02 (outliers 1.95 % -> 0); ViT-Tiny has 0.48 and 0.50.
LEAST_GAP = 0.01
# Share of the activation on outlier tokens; the next norm keeps the direction alone (docs/figures.md).
STRENGTH = 0.07
# Rows in the sample for the quantile.
SAMPLES = 65536


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
        neurons: of the base model; rewritten from the shallowest block on, since each block changes the later ones.
        batches: normalised images ``(B, 3, H, W)``, a few hundred in all; iterated once per block.
        strength: activation at the register, as a share of the activation on outlier tokens.

    Returns:
        The neurons that were not moved, each with the reason.

    Raises:
        PhregError: none of the neurons can be moved.
    """
    reasons: dict[RegisterNeuron, str] = {}
    for index, group in groupby(sorted(neurons, key=lambda n: n.block), key=lambda n: n.block):
        mlp, units = student.blocks[index].mlp, list(group)
        reason = why_unmovable(mlp)
        if reason is None:
            statistics = _measure_inputs(student, index, batches, advance)
            direction, rest = _discriminant(statistics)
            if rest <= 1 - LEAST_GAP:
                for unit in units:
                    _rewrite(mlp, unit, direction, statistics.mean, rest, strength)
                continue
            reason = (
                f"its input does not tell the register from other tokens: their {QUANTILE} quantile lies at {rest:.2f} "
                f"of the way from their mean to the register, expected at most {1 - LEAST_GAP:.2f}"
            )
        reasons.update((unit, reason) for unit in units)
    if neurons and len(reasons) == len(neurons):
        first = min(reasons, key=lambda n: n.block)
        raise PhregError(
            f"transplant: none of the {len(reasons)} register neurons can be moved; unit {first.unit} of block "
            f"{first.block}: {reasons[first]}. Distil with --recipe random-registers."
        )
    return reasons


def why_unmovable(mlp: ViT) -> str | None:
    """The reason why units of this MLP cannot be rewritten, or None."""
    layers = (mlp.fc1_g, mlp.fc1_x) if hasattr(mlp, "fc1_g") else (mlp.fc1,)
    if any(layer.bias is None for layer in layers):
        return "its MLP has no bias, so nothing can hold the unit at zero for the other tokens"
    if zero_below(mlp.act) is None:
        return f"its activation {type(mlp.act).__name__} does not go to zero for negative inputs"
    return None


def zero_below(activation: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
    """The largest input, in steps of 1/8, such that the activation is zero from there down; None if there is none."""
    points = torch.arange(0, LOWEST_INPUT - 0.125, -0.125, dtype=torch.float64)
    zero = activation(points.clone()).abs() <= ZERO_TOLERANCE
    last = int((~zero).nonzero().max()) if not zero.all() else -1
    return None if last == len(points) - 1 else float(points[last + 1])


@torch.no_grad()
def silence(student: ViT, neurons: list[RegisterNeuron]) -> None:
    """Make the units write nothing: the control without registers."""
    for neuron in neurons:
        student.blocks[neuron.block].mlp.fc2.weight[:, neuron.unit] = 0


class _RowSample:
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
            smallest = self.keys.topk(self.most, largest=False).indices
            self.rows, self.keys = self.rows[smallest], self.keys[smallest]


@dataclass
class _InputStatistics:
    """Inputs of one block's MLP, float64.

    ``register`` ``(C,)``: mean at the first register. Over class and patch tokens: ``mean`` ``(C,)``, ``covariance``
    ``(C, C)`` and ``sample`` ``(S, C)``. Other registers are left out, since they may fire as well.
    """

    register: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    sample: torch.Tensor


def _measure_inputs(
    student: ViT, index: int, batches: Iterable[torch.Tensor], advance: Callable[[int], None]
) -> _InputStatistics:
    """Run the student on ``batches``, and measure what the MLP of block ``index`` reads."""
    width, first_patch = student.embed_dim, student.num_prefix_tokens
    register = int(student.cls_token is not None)
    total, square, at_register = (torch.zeros(s, dtype=torch.float64) for s in ((width,), (width, width), (width,)))
    count, images, sample = 0, 0, _RowSample(width, SAMPLES)

    def add(_module: ViT, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal count, images
        z = inputs[0].detach().float().cpu()  # (B, T, C)
        rows = torch.cat([z[:, :register], z[:, first_patch:]], dim=1).reshape(-1, width)
        sample.add(rows)
        others = rows.double()
        at_register.add_(z[:, register].double().sum(0))
        total.add_(others.sum(0))
        square.add_(others.T @ others)
        count, images = count + len(others), images + len(z)

    handle = student.blocks[index].mlp.register_forward_pre_hook(add)
    try:
        for batch in batches:
            hooks.forward(student, batch)
            advance(len(batch))
    finally:
        handle.remove()
    mean = total / count
    covariance = square / count - torch.outer(mean, mean)
    return _InputStatistics(at_register / images, mean, covariance, sample.rows.double())


def _discriminant(inputs: _InputStatistics) -> tuple[torch.Tensor, float]:
    """The direction ``(C,)`` on which the other tokens' mean lies at 0 and the register at 1; and their quantile."""
    ridge = RIDGE * inputs.covariance.diagonal().mean()
    difference = inputs.register - inputs.mean
    identity = torch.eye(len(inputs.mean), dtype=inputs.mean.dtype)
    direction = torch.linalg.solve(inputs.covariance + ridge * identity, difference)
    direction = direction / (direction @ difference)
    return direction, float(((inputs.sample - inputs.mean) @ direction).quantile(QUANTILE))


def _rewrite(
    mlp: ViT, neuron: RegisterNeuron, direction: torch.Tensor, mean: torch.Tensor, rest: float, strength: float
) -> None:
    """Set the pre-activation to gain * direction.(z - mean) + offset; the activation is zero at ``rest`` and below."""
    wanted = strength * neuron.activation
    gate, value = _rows(mlp, neuron.unit)
    # The gate of a gated unit only has to be open.
    level = wanted if value is None else max(abs(wanted), 4.0)
    # GELU and similar activations have almost no negative side: write the mirror image instead.
    if value is None and level <= 0:
        level = abs(wanted)
        mlp.fc2.weight[:, neuron.unit] *= -1
    zero = zero_below(mlp.act)
    # ``why_unmovable`` has checked this.
    assert zero is not None
    gain = (level - zero) / (1.0 - rest)
    offset = level - gain
    weight, bias = gate
    weight.copy_((gain * direction).to(weight))
    bias.copy_(torch.as_tensor(offset - gain * float(direction @ mean)).to(bias))
    if value is not None:
        weight, bias = value
        weight.zero_()
        bias.copy_(torch.as_tensor(wanted / float(mlp.act(torch.tensor(level)))).to(bias))


def _rows(mlp: ViT, unit: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
    """Weight row and bias of a unit's gate; and of its value, None unless the MLP is gated."""
    if hasattr(mlp, "fc1_g"):
        return (mlp.fc1_g.weight[unit], mlp.fc1_g.bias[unit]), (mlp.fc1_x.weight[unit], mlp.fc1_x.bias[unit])
    first = (mlp.fc1.weight[unit], mlp.fc1.bias[unit])
    if not hasattr(mlp, "gate_last"):
        return first, None
    hidden = mlp.fc2.in_features
    second = (mlp.fc1.weight[unit + hidden], mlp.fc1.bias[unit + hidden])
    return (second, first) if mlp.gate_last else (first, second)
