"""The module that is traced: raw uint8 image in, dense features out, constants folded into the weights.

Axes: B batch, (Hp, Wp) patch grid, N = Hp * Wp, T = 1 + R + N tokens, C width, H heads, D head width, p patch side.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import nn

from phreg_deploy.export.folding import (
    CENTRE,
    fold_attention_scale,
    fold_layer_scale,
    fold_normalisation,
    patch_positions,
    prefix_tokens,
)
from phreg_deploy.models.hooks import ViT, final_norm
from phreg_deploy.spec import Preprocess


class DenseViT(nn.Module):
    """A supported timm ViT without preprocessing, dropout, LayerScale or classification head.

    Args:
        model: a model at its input size, which a rotary embedding is computed for; not changed.
        preprocess: its mean and standard deviation are folded into the patch projection.
        positions_as_input: take ``pos_embed`` ``(1, N, C)`` as a second input, for bundles with several sizes.
    """

    def __init__(self, model: ViT, preprocess: Preprocess, *, positions_as_input: bool = False) -> None:
        super().__init__()
        self.patch = tuple(model.patch_embed.patch_size)
        self.class_token = model.cls_token is not None
        self.prefix_count = model.num_prefix_tokens
        weight, bias = fold_normalisation(model.patch_embed.proj, preprocess.mean, preprocess.std)
        self.projection = nn.Parameter(weight)
        positions = patch_positions(model)
        self.learned = positions is not None
        if positions_as_input or positions is None or not isinstance(model.patch_embed.norm, nn.Identity):
            self.offset = nn.Parameter(bias)  # (C,)
            self.positions = None if positions_as_input or positions is None else nn.Parameter(positions)
        else:
            # (1, N, C): one addition instead of two.
            self.offset = nn.Parameter(bias + positions)
            self.positions = None
        self.patch_norm = copy.deepcopy(model.patch_embed.norm)
        prefix = prefix_tokens(model)
        self.prefix = None if prefix is None else nn.Parameter(prefix)
        self.norm_pre = copy.deepcopy(model.norm_pre)
        ropes = _rotary(model)
        self.blocks = nn.ModuleList(
            DenseBlock(block, rope, self.prefix_count) for block, rope in zip(model.blocks, ropes)
        )
        self.norm = copy.deepcopy(final_norm(model))

    def forward(self, image: torch.Tensor, pos_embed: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Compute dense features.

        Args:
            image: uint8 ``(B, H, W, 3)``, values 0-255.

        Returns:
            features ``(B, Hp, Wp, C)``, cls ``(B, C)`` if the model has a class token, token_norm ``(B, Hp, Wp)``.
        """
        b, height, width, _ = image.shape
        hp, wp = height // self.patch[0], width // self.patch[1]
        # The Cast comes first: TensorRT feeds uint8 to no other operator.
        x = image.float() - CENTRE
        x = x.reshape(b, hp, self.patch[0], wp, self.patch[1], 3).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, hp * wp, -1)  # (B, N, p * p * 3)
        x = self.patch_norm(x @ self.projection + self.offset)  # (B, N, C)
        if pos_embed is not None and self.learned:
            x = x + pos_embed
        elif self.positions is not None:
            x = x + self.positions
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(b, -1, -1), x], dim=1)  # (B, T, C)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        patches = x[:, self.prefix_count :]  # (B, N, C), without registers
        token_norm = patches.square().sum(-1).sqrt().reshape(b, hp, wp)
        features = self.norm(patches).reshape(b, hp, wp, -1)
        if not self.class_token:
            return features, token_norm
        return features, self.norm(x[:, 0]), token_norm


class DenseBlock(nn.Module):
    """A pre-norm block, equal to timm's, with LayerScale folded into its linear layers."""

    def __init__(self, block: ViT, rope: torch.Tensor | None, prefix_count: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = copy.deepcopy(block.norm1), copy.deepcopy(block.norm2)
        self.attn = DenseAttention(block.attn, rope, prefix_count)
        self.mlp = copy.deepcopy(block.mlp)
        fold_layer_scale(self.attn.proj, _layer_scale(block, 1))
        fold_layer_scale(self.mlp.fc2, _layer_scale(block, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DenseAttention(nn.Module):
    """Attention with one qkv projection whose query rows are scaled, written out so that each runtime can fuse it."""

    def __init__(self, attn: ViT, rope: torch.Tensor | None, prefix_count: int) -> None:
        super().__init__()
        self.heads, self.head_width, self.prefix_count = attn.num_heads, attn.head_dim, prefix_count
        width = self.heads * self.head_width
        weight, bias = _fused_qkv(attn)
        self.q_norm, self.k_norm = copy.deepcopy(attn.q_norm), copy.deepcopy(attn.k_norm)
        self.scale = None if isinstance(self.q_norm, nn.Identity) else attn.scale
        if self.scale is None:
            fold_attention_scale(weight, bias, width, attn.scale)
        self.qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.qkv.weight = nn.Parameter(weight)
        if bias is not None:
            self.qkv.bias = nn.Parameter(bias)
        self.norm, self.gate, self.proj = copy.deepcopy(attn.norm), copy.deepcopy(attn.gate), copy.deepcopy(attn.proj)
        self.half_rotation = bool(getattr(attn, "rotate_half", False))
        self.rope: Any = None if rope is None else nn.Parameter(rope.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        parts = self.qkv(x).chunk(3, dim=-1)
        # Each (B, H, T, D).
        q, k, v = (part.reshape(b, t, self.heads, self.head_width).transpose(1, 2) for part in parts)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self._rotate(q), self._rotate(k)
        if self.scale is not None:
            q = q * self.scale
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        y = self.norm(y.transpose(1, 2).reshape(b, t, -1))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj(y)  # type: ignore[no-any-return]

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the patch tokens by their position; class token and registers have none."""
        head, tail = x[:, :, : self.prefix_count], x[:, :, self.prefix_count :]
        return torch.cat([head, apply_rot_embed_cat(tail, self.rope, half=self.half_rotation)], dim=2)


def _fused_qkv(attn: ViT) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return copies of weight ``(3 * H * D, C)`` and bias of the queries, keys and values of timm's attention."""
    if attn.qkv is not None:
        weight, bias = attn.qkv.weight.detach().clone(), attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        return weight, None if bias is None else bias.detach().clone()
    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
    weight = torch.cat([part.weight.detach() for part in parts])
    if all(part.bias is None for part in parts):
        return weight, None
    zeros = torch.zeros(len(weight) // 3)
    return weight, torch.cat([zeros if part.bias is None else part.bias.detach() for part in parts])


def _layer_scale(block: ViT, which: int) -> torch.Tensor | None:
    gamma = getattr(getattr(block, f"ls{which}", None), "gamma", None)
    return getattr(block, f"gamma_{which}", None) if gamma is None else gamma


def _rotary(model: ViT) -> list[torch.Tensor | None]:
    """Return the rotary embedding of each block at the model's input size, None for models without one."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return [None] * len(model.blocks)
    table = rope.get_embed() if hasattr(rope, "feat_shape") else rope.get_embed(shape=model.patch_embed.grid_size)
    table = table.detach()
    return list(table) if getattr(model, "rope_mixed", False) else [table] * len(model.blocks)
