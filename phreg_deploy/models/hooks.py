"""Hook into a ViT: block outputs, hidden units of MLPs, and the dense features that are served.

Works alike for timm's ``VisionTransformer`` and ``Eva``, and for plain and gated MLPs. B batch, N patch tokens,
R registers, T = [class] + R + N tokens, C width, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from phreg_deploy.models.readouts import last_block, project, readout_of

# A timm VisionTransformer or Eva, or a part of one. timm has no types, and PyTorch types every attribute as
# Tensor | Module.
ViT = Any


@dataclass
class Features:
    """``tokens`` ``(B, T, C)`` after the final norm; ``norms`` ``(B, N)``, L2 norms of patch tokens before it.

    If the model's readout projects, ``tokens`` are ``(B, T, P)`` in the projected space.
    ``head_input``: the result of timm's ``forward_features``; not ``tokens`` if the final norm is ``fc_norm``.
    ``layers``: the patch tokens of each further layer that was asked for, after the final norm, ``(B, N, C)`` each.
    """

    tokens: torch.Tensor
    head_input: torch.Tensor
    norms: torch.Tensor
    prefix: int
    class_token: bool
    layers: tuple[torch.Tensor, ...] = ()

    @property
    def patches(self) -> torch.Tensor:  # (B, N, C)
        return self.tokens[:, self.prefix :]

    @property
    def cls(self) -> torch.Tensor | None:  # (B, C)
        return self.tokens[:, 0] if self.class_token else None


def forward(model: ViT, images: torch.Tensor, layers: Sequence[int] = ()) -> Features:
    """Compute the features of normalised ``images`` ``(B, 3, H, W)`` by the model's readout.

    ``layers``: further layers, by the number of blocks that their tokens have passed.
    """
    streams: dict[int, torch.Tensor] = {}
    residuals: list[torch.Tensor] = []
    readout = readout_of(model)
    handle = model.norm.register_forward_pre_hook(lambda _module, inputs: residuals.append(inputs[0]))
    try:
        with ExitStack() as stack:
            stack.enter_context(last_block(model, readout))
            if layers:
                stack.enter_context(block_outputs(model, lambda i, out: streams.update({i + 1: out})))
            head_input = model.forward_features(images)
    finally:
        handle.remove()
    prefix, norm = model.num_prefix_tokens, final_norm(model)
    tokens = head_input if norm is model.norm else norm(head_input)
    if readout.project:
        tokens = project(model, tokens)
    norms = residuals[0][:, prefix:].float().norm(dim=-1)
    middle = tuple(norm(streams[layer])[:, prefix:] for layer in layers)
    return Features(tokens, head_input, norms, prefix, model.cls_token is not None, middle)


def final_norm(model: ViT) -> ViT:
    """The norm between the residual stream and the served features.

    Models trained with average pooling (EVA02, EVA-g, timm's ``_gap_`` ViTs) have only ``fc_norm``, which normalises
    the pooled token; here it normalises each token, since their head never reads a raw residual.
    """
    pooled = isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
    return model.fc_norm if pooled else model.norm


@contextmanager
def block_outputs(model: ViT, receive: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While open, every forward calls ``receive(block, output)`` with output ``(B, T, C)``."""
    handles = [b.register_forward_hook(lambda _m, _i, out, i=i: receive(i, out)) for i, b in enumerate(model.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def class_attention(model: ViT, receive: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While open, every forward calls ``receive`` with the class token's attention in the last block ``(B, heads, T)``.

    timm then computes that block's attention step by step, and the softmax over all keys is what its dropout receives.
    """
    attn = model.blocks[-1].attn
    fused, attn.fused_attn = attn.fused_attn, False
    handle = attn.attn_drop.register_forward_pre_hook(lambda _module, inputs: receive(inputs[0][:, :, 0]))
    try:
        yield
    finally:
        handle.remove()
        attn.fused_attn = fused


@contextmanager
def hidden_units(model: ViT, receive: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While open, every forward calls ``receive(block, hidden)`` with each MLP's activated units ``(B, T, H)``."""

    readers = [inner_norm(block.mlp) or block.mlp.fc2 for block in model.blocks]
    handles = [
        reader.register_forward_pre_hook(lambda _m, inputs, i=i: receive(i, inputs[0]))
        for i, reader in enumerate(readers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inner_norm(mlp: ViT) -> ViT | None:
    """The norm between the activated hidden layer and ``fc2`` (EVA02-B and -L), or None."""
    inner = getattr(mlp, "norm", None)
    return None if isinstance(inner, nn.Identity) else inner


def normalise(images: np.ndarray | torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Turn uint8 images ``(B, H, W, 3)`` into the model's input, float32 ``(B, 3, H, W)``."""
    x = torch.as_tensor(images).permute(0, 3, 1, 2).float().div_(255)
    centre = torch.tensor(mean, device=x.device).view(1, 3, 1, 1)
    return (x - centre) / torch.tensor(std, device=x.device).view(1, 3, 1, 1)
