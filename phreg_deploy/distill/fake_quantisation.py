"""A student that computes as its INT8 bundle will: the same places, the same ranges, rounded with a straight-through gradient.

The grids are those of ``phreg_deploy.quantisation``, which ``calibrate`` uses too. B batch, T tokens, C input channels,
O output channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from phreg_deploy.errors import PhregError
from phreg_deploy.models.hooks import ViT
from phreg_deploy.quantisation import WEIGHT_STEPS, Grid, Range, Smoothing, make_grid


def quantised_layers(model: ViT) -> dict[str, tuple[nn.Linear, str]]:
    """The linear layers that ``calibrate`` takes to 8 bits, by name, and what feeds each (``quantisation.place``).

    Raises:
        PhregError: a model whose layers are not called as modules, so that their inputs cannot be reached.
    """
    found: dict[str, tuple[nn.Linear, str]] = {}
    for i, block in enumerate(model.blocks):
        if getattr(block.attn, "q_bias", None) is not None:
            raise PhregError(
                "int8-aware: got an Eva model with separate query and value biases, whose projection is no module call; expected a "
                "model without. Distil without --int8-aware, and leave sensitive layers in float with `calibrate --float-macs`."
            )
        for part in ("attn", "mlp"):
            room = getattr(block, part)
            inner = getattr(room, "norm", None)
            last = {"attn": "value", "mlp": "hidden"}[part]
            if getattr(room, "gate", None) is not None:  # multiplied in after the norm, so nothing can be folded
                last = "hidden"
            elif inner is not None and not isinstance(inner, nn.Identity):
                last = "norm"
            for name, layer in room.named_children():
                if isinstance(layer, nn.Linear):
                    found[f"blocks.{i}.{part}.{name}"] = (layer, last if name in ("proj", "fc2", "w3") else "norm")
    return found


@torch.no_grad()
def observe(model: ViT, batches: Iterable[torch.Tensor], smoothing: Smoothing) -> dict[str, Grid]:
    """Grid of every layer's input over normalised ``batches`` ``(B, 3, H, W)``; ``model`` must not be quantised meanwhile."""
    layers = quantised_layers(model)
    ranges: dict[str, Range] = {}
    skipped = slice(int(model.cls_token is not None), model.num_prefix_tokens)

    def watch(name: str, kind: str) -> Any:
        def see(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].float()  # (B, T, C)
            if kind == "hidden" and not smoothing.registers:
                x = torch.cat([x[:, : skipped.start], x[:, skipped.stop :]], dim=1)
            low, high = (v.cpu().numpy() for v in torch.aminmax(x.flatten(0, 1), dim=0))
            now = Range(low, high)
            ranges[name] = ranges[name].join(now) if name in ranges else now

        return see

    handles = [layer.register_forward_pre_hook(watch(name, kind)) for name, (layer, kind) in layers.items()]
    was = model.training
    model.eval()
    try:
        for batch in batches:
            model.forward_features(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was)
    return {name: make_grid(ranges[name], kind, smoothing) for name, (_, kind) in layers.items()}


@contextmanager
def quantised(model: ViT, grids: dict[str, Grid]) -> Iterator[None]:
    """While open, the layers that have a grid compute in fake 8 bits; parameters and state dict stay as they are."""
    layers = {name: layer for name, (layer, _) in quantised_layers(model).items() if name in grids} if grids else {}
    for name, layer in layers.items():
        layer.forward = _Quantised(layer, grids[name])  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


class _Quantised:
    """y = step_x step_w (k_x k_w) + (b + W c), with integers k, which bfloat16 holds exactly up to 256."""

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
        bias = (
            F.linear(self.centre, weight) if self.layer.bias is None else self.layer.bias.float() + weight @ self.centre
        )
        return F.linear(k_x, k_w) * (steps * self.step) + bias


class _Round(torch.autograd.Function):
    """Round and clip; the gradient passes straight through, but not where it was clipped (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
        ctx.save_for_backward((x >= lowest - 0.5) & (x <= highest + 0.5))
        return x.round().clamp_(lowest, highest)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None, None
