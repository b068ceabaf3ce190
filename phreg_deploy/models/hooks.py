"""Reading a ViT in the middle: block outputs, MLP inputs and hidden units, and the features that are served.

Uniform over timm's ``VisionTransformer`` and ``Eva``, and over its plain and gated MLPs. B batch, N patch tokens,
R registers, T = [class] + R + N tokens, C width, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

ViT = Any  # a timm VisionTransformer or Eva, or a part of one: timm publishes no types, and torch types every attribute as Tensor | Module


@dataclass
class Features:
    """``tokens`` after the final norm ``(B, T, C)``; ``norms`` the pre-norm L2 norms of patch tokens ``(B, N)``.

    ``given``: timm's ``forward_features``, which its head takes; the same as ``tokens`` unless the final norm is ``fc_norm``.
    """

    tokens: torch.Tensor
    given: torch.Tensor
    norms: torch.Tensor
    prefix: int
    class_token: bool

    @property
    def patches(self) -> torch.Tensor:  # (B, N, C)
        return self.tokens[:, self.prefix :]

    @property
    def cls(self) -> torch.Tensor | None:  # (B, C)
        return self.tokens[:, 0] if self.class_token else None


def forward(model: ViT, images: torch.Tensor) -> Features:
    """Dense features of normalised ``images`` ``(B, 3, H, W)`` after ``final_norm``, and the patch norms before it."""
    kept: list[torch.Tensor] = []
    handle = model.norm.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    try:
        given = model.forward_features(images)
    finally:
        handle.remove()
    prefix, norm = model.num_prefix_tokens, final_norm(model)
    tokens = given if norm is model.norm else norm(given)
    return Features(tokens, given, kept[0][:, prefix:].float().norm(dim=-1), prefix, model.cls_token is not None)


def final_norm(model: ViT) -> ViT:
    """The norm between the residual stream and what is served.

    Models that were trained with average pooling (EVA02, EVA-g, timm's ``_gap_`` ViTs) have none on their tokens, only
    ``fc_norm`` on the pooled one; there it is taken for each token, since the head never sees a raw residual either.
    """
    unnormed = isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
    return model.fc_norm if unnormed else model.norm


@contextmanager
def block_outputs(model: ViT, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While open, every forward calls ``see(block, output)`` with output ``(B, T, C)``."""
    handles = [b.register_forward_hook(lambda _m, _i, out, i=i: see(i, out)) for i, b in enumerate(model.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hidden_units(model: ViT, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While open, every forward calls ``see(block, hidden)`` with the activated hidden units ``(B, T, H)`` of each MLP."""

    def watch(i: int) -> torch.utils.hooks.RemovableHandle:
        return hidden_tap(model.blocks[i].mlp).register_forward_pre_hook(lambda _m, inputs: see(i, inputs[0]))

    handles = [watch(i) for i in range(len(model.blocks))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inner_norm(mlp: ViT) -> ViT | None:
    """The norm between the activated hidden layer and ``fc2``, as EVA02-B and -L have one; None where there is none."""
    inner = getattr(mlp, "norm", None)
    return None if isinstance(inner, nn.Identity) else inner


def hidden_tap(mlp: ViT) -> ViT:
    """The module whose input is the activated hidden layer: the MLP's inner norm where it has one, else ``fc2``."""
    return inner_norm(mlp) or mlp.fc2


def normalise(images: np.ndarray | torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 ``(B, H, W, 3)`` -> float32 ``(B, 3, H, W)`` as the model expects it."""
    x = torch.as_tensor(images).permute(0, 3, 1, 2).float().div_(255)
    centre = torch.tensor(mean, device=x.device).view(1, 3, 1, 1)
    return (x - centre) / torch.tensor(std, device=x.device).view(1, 3, 1, 1)
