"""Moving register neurons from patch tokens to a register token, in closed form and without a gradient.

Each register neuron's ``fc1`` row becomes the direction that best separates the register's normalised input from every
patch's and class token's (linear discriminant with a ridge); its bias puts those deep in the activation's zero, and the
register at a chosen strength. Its ``fc2`` column stays. Ours; the neurons are those of arXiv 2506.08010, which moves
their activations at run time instead.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch

from phreg_deploy.distill import taps
from phreg_deploy.distill.neurons import RegisterNeuron
from phreg_deploy.distill.taps import ViT

RIDGE = 0.05  # of the mean variance
SILENT = -4.0  # pre-activation at the others' 0.9999 quantile: GELU(-4) = -1.3e-4
QUANTILE = 0.9999
STRENGTH = 0.07  # of the outliers' activation: the next norm sees a direction only (benchmarks/README.md)
SAMPLES = 65536  # rows kept for the quantile


@torch.no_grad()
def transplant(
    student: ViT,
    neurons: list[RegisterNeuron],
    batches: list[torch.Tensor],
    *,
    strength: float = STRENGTH,
    advance: Callable[[int], None] = lambda _n: None,
) -> None:
    """Rewrite ``neurons`` in place so that they fire for the student's first register token only.

    Args:
        student: a model with at least one register token.
        neurons: of the base model; rewritten block by block from the shallowest, since each changes what follows.
        batches: normalised images ``(B, 3, H, W)``; a few hundred images in all.
        strength: activation at the register, in activations that the outlier tokens had.
    """
    sink = int(student.cls_token is not None)
    for index, group in groupby(sorted(neurons, key=lambda n: n.block), key=lambda n: n.block):
        mean, centre, covariance, others = _statistics(student, index, batches, sink, advance)
        ridge = RIDGE * covariance.diagonal().mean()
        direction = torch.linalg.solve(covariance + ridge * torch.eye(len(centre), dtype=centre.dtype), mean - centre)
        direction = direction / (direction @ (mean - centre))  # the register sits at 1 above the others' mean
        rest = ((others - centre) @ direction).quantile(QUANTILE)
        for neuron in group:
            _rewrite(student.blocks[index].mlp, neuron, direction, centre, float(rest), strength)


@torch.no_grad()
def silence(student: ViT, neurons: list[RegisterNeuron]) -> None:
    """The control without registers: the same units never fire again."""
    for neuron in neurons:
        student.blocks[neuron.block].mlp.fc2.weight[:, neuron.unit] = 0


def _statistics(
    student: ViT, index: int, batches: list[torch.Tensor], sink: int, advance: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the MLP's inputs in one block: mean at the register; mean, covariance and a sample over the other tokens.

    Other registers are left out: they may fire as well. All in float64.
    """
    width, start = student.embed_dim, student.num_prefix_tokens
    total, square, at_sink = (torch.zeros(s, dtype=torch.float64) for s in ((width,), (width, width), (width,)))
    count, images, rows = 0, 0, []

    def see(_module: ViT, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal count, images
        z = inputs[0].detach().double().cpu()  # (B, T, C)
        others = torch.cat([z[:, :sink], z[:, start:]], dim=1).reshape(-1, width)
        at_sink.add_(z[:, sink].sum(0))
        total.add_(others.sum(0))
        square.add_(others.T @ others)
        count, images = count + len(others), images + len(z)
        rows.append(others)

    handle = student.blocks[index].mlp.register_forward_pre_hook(see)
    try:
        for batch in batches:
            taps.forward(student, batch)
            advance(len(batch))
    finally:
        handle.remove()
    centre = total / count
    every = max(1, count // SAMPLES)
    return at_sink / images, centre, square / count - torch.outer(centre, centre), torch.cat(rows)[::every]


def _rewrite(
    mlp: ViT, neuron: RegisterNeuron, direction: torch.Tensor, centre: torch.Tensor, rest: float, strength: float
) -> None:
    """Pre-activation = gain * direction.(z - centre) + offset: ``level`` at the register, ``SILENT`` at the others' quantile."""
    wanted = strength * neuron.activation
    gate, value = _rows(mlp, neuron.unit)
    level = wanted if value is None else max(abs(wanted), 4.0)  # a gated unit's gate only has to be open
    if (
        value is None and level <= 0
    ):  # GELU and its kin have no negative side to speak of: write the mirror image instead
        level = abs(wanted)
        mlp.fc2.weight[:, neuron.unit] *= -1
    gap = 1.0 - rest
    gain = (level - SILENT) / max(gap, 1e-3)
    offset = level - gain
    weight, bias = gate
    weight.copy_((gain * direction).to(weight))
    bias.copy_(torch.as_tensor(offset - gain * float(direction @ centre)).to(bias))
    if value is not None:
        weight, bias = value
        weight.zero_()
        bias.copy_(torch.as_tensor(wanted / level).to(bias))


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
