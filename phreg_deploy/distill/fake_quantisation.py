"""Let a student compute as its INT8 bundle will: the same layers, ranges and rounding, with straight-through gradients.

The grids are those of ``phreg_deploy.quantisation``, which ``calibrate`` uses too. B batch, T tokens, C input channels,
O output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from phreg_deploy.errors import PhregError
from phreg_deploy.models.hooks import ViT
from phreg_deploy.quantisation import WEIGHT_STEPS, Grid, Range, Smoothing, make_grid


def quantised_layers(model: ViT) -> dict[str, tuple[nn.Linear, str]]:
    """Return the linear layers that ``calibrate`` takes to 8 bits, by name, each with its kind (see ``make_grid``).

    Raises ``PhregError`` if the model does not call its layers as modules; hooks then cannot reach their inputs.
    """
    layers: dict[str, tuple[nn.Linear, str]] = {}
    for i, block in enumerate(model.blocks):
        if getattr(block.attn, "q_bias", None) is not None:
            raise PhregError(
                "int8-aware: got an Eva model with separate query and value biases, whose projection is no module "
                "call; expected a model without. Distil without --int8-aware, and leave sensitive layers in float "
                "with `calibrate --float-macs`."
            )
        for part in ("attn", "mlp"):
            parent = getattr(block, part)
            kind = _kind_of_last(parent, part)
            for name, layer in parent.named_children():
                if isinstance(layer, nn.Linear):
                    layers[f"blocks.{i}.{part}.{name}"] = (layer, kind if name in ("proj", "fc2", "w3") else "norm")
    return layers


def _kind_of_last(parent: nn.Module, part: str) -> str:
    """Return what feeds the last layer of an attention or an MLP: "value", "hidden", or "norm" after a norm."""
    # A gate is multiplied in after the norm, so nothing can be folded into the norm.
    if getattr(parent, "gate", None) is not None:
        return "hidden"
    inner = getattr(parent, "norm", None)
    if inner is not None and not isinstance(inner, nn.Identity):
        return "norm"
    return "value" if part == "attn" else "hidden"


@torch.no_grad()
def observe_grids(model: ViT, batches: Iterable[torch.Tensor], smoothing: Smoothing) -> dict[str, Grid]:
    """Return the grid of every layer's input over normalised ``batches`` ``(B, 3, H, W)``.

    ``model`` must not be inside ``quantised``.
    """
    layers = quantised_layers(model)
    ranges: dict[str, Range] = {}
    registers = slice(int(model.cls_token is not None), model.num_prefix_tokens)

    def hook_of(name: str, kind: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def widen_range(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].float()  # (B, T, C)
            if kind == "hidden" and not smoothing.registers:
                x = torch.cat([x[:, : registers.start], x[:, registers.stop :]], dim=1)
            low, high = (v.cpu().numpy() for v in torch.aminmax(x.flatten(0, 1), dim=0))
            batch_range = Range(low, high)
            ranges[name] = ranges[name].join(batch_range) if name in ranges else batch_range

        return widen_range

    handles = [layer.register_forward_pre_hook(hook_of(name, kind)) for name, (layer, kind) in layers.items()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model.forward_features(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: make_grid(ranges[name], kind, smoothing) for name, (_, kind) in layers.items()}


@contextmanager
def quantised(model: ViT, grids: dict[str, Grid]) -> Iterator[None]:
    """Let the layers that have a grid compute in fake INT8 in the block; parameters and state dict do not change."""
    layers = {name: layer for name, (layer, _) in quantised_layers(model).items() if name in grids} if grids else {}
    for name, layer in layers.items():
        layer.forward = _Quantised(layer, grids[name])  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


class _Quantised:
    """A layer's forward: y = step_x step_w (k_x k_w) + (b + W c), with integers k; bfloat16 is exact up to 256."""

    def __init__(self, layer: nn.Linear, grid: Grid) -> None:
        device = layer.weight.device
        self.layer, self.step = layer, grid.step
        self.centre, self.smooth = (torch.from_numpy(v).to(device) for v in (grid.centre, grid.smooth))
        self.lowest, self.highest = (-WEIGHT_STEPS, WEIGHT_STEPS) if grid.symmetric else (-grid.zero, 255 - grid.zero)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer.weight.float()  # (O, C)
        smoothed = weight * self.smooth
        steps = (smoothed.detach().abs().amax(dim=1) / WEIGHT_STEPS).clamp_min(1e-12)  # (O,)
        k_w = _Round.apply(smoothed / steps[:, None], -WEIGHT_STEPS, WEIGHT_STEPS)
        k_x = _Round.apply((x.float() - self.centre) / (self.smooth * self.step), self.lowest, self.highest)
        bias = weight @ self.centre
        if self.layer.bias is not None:
            bias = self.layer.bias.float() + bias
        return F.linear(k_x, k_w) * (steps * self.step) + bias


class _Round(torch.autograd.Function):
    """Round and clip. The gradient passes straight through, except at clipped values (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
        ctx.save_for_backward((x >= lowest - 0.5) & (x <= highest + 0.5))
        return x.round().clamp_(lowest, highest)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None, None
