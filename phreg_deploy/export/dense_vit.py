"""The module that is traced: raw uint8 image in, dense features out, constants folded into the weights.

Axes: B batch, (Hp, Wp) patch grid, N = Hp * Wp, T = 1 + R + N tokens, C width, H heads, D head width, p patch side.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from phreg_deploy.export.dense_readout import DenseReadout
from phreg_deploy.export.folding import (
    CENTRE,
    fold_attention_scale,
    fold_layer_scale,
    fold_normalisation,
    fused_qkv,
    layer_scale,
    patch_positions,
    prefix_tokens,
)
from phreg_deploy.export.projection import projection_of
from phreg_deploy.export.rotary import is_half, rotary_tables
from phreg_deploy.export.rotation import Turn, paired_halves, reorder_norm, rotate, wide_tables
from phreg_deploy.layers import Layers, output_names
from phreg_deploy.models.hooks import ViT, final_norm
from phreg_deploy.models.readouts import readout_of
from phreg_deploy.readout import FINAL
from phreg_deploy.spec import Preprocess


class DenseViT(nn.Module):
    """A supported timm ViT without preprocessing, dropout, LayerScale or classification head.

    Args:
        model: a model at its input size, which a rotary embedding is computed for; not changed.
        preprocess: its mean and standard deviation are folded into the patch projection.
        positions_as_input: take the position embeddings that the model has as further inputs, for bundles with several
            sizes: ``pos_embed`` ``(1, N, C)``, ``rotary`` ``(2, L, H, N, D / 2)``.
        layers: further layers to return.
        attention: return the class token's attention in the last block too; the model must have a class token.

    The last block and the projection follow the model's readout (``models.readouts``).
    """

    def __init__(
        self,
        model: ViT,
        preprocess: Preprocess,
        *,
        positions_as_input: bool = False,
        layers: Layers | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.patch = tuple(model.patch_embed.patch_size)
        self.class_token = model.cls_token is not None
        self.prefix_count = model.num_prefix_tokens
        weight, bias = fold_normalisation(model.patch_embed.proj, preprocess.mean, preprocess.std)
        self.projection = nn.Parameter(weight)
        positions = patch_positions(model)
        rotary = rotary_tables(model)
        self.tables: dict[str, torch.Tensor] = {}
        if positions_as_input:
            tables = {"pos_embed": positions, "rotary": rotary}
            self.tables = {name: table for name, table in tables.items() if table is not None}
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
        self.turns = nn.ParameterList()
        if rotary is not None and not positions_as_input:
            self.turns.extend(part for wide in wide_tables(rotary, self.prefix_count) for part in wide)
        neighbours = rotary is not None and not is_half(model)
        readout = readout_of(model)
        self.blocks = nn.ModuleList(DenseBlock(block, neighbours) for block in model.blocks[:-1])
        if readout.name == FINAL:
            self.blocks.append(DenseBlock(model.blocks[-1], neighbours))
        else:
            grid = None if positions_as_input else tuple(model.patch_embed.grid_size)
            self.blocks.append(DenseReadout(model.blocks[-1], readout, self.prefix_count, neighbours, grid))
        self.norm = copy.deepcopy(final_norm(model))
        self.project = projection_of(model) if readout.project else None
        self.channels = model.embed_dim if self.project is None else self.project.channels
        self.layers, self.heads = layers, model.blocks[-1].attn.num_heads
        self.class_attention = ClassAttention() if attention else None
        self.outputs = output_names(self.class_token, layers, attention)

    def forward(self, image: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute dense features.

        Args:
            image: uint8 ``(B, H, W, 3)``, values 0-255.
            tables: the inputs that ``self.tables`` has examples of, in its order.

        Returns:
            ``self.outputs`` in their order: features ``(B, Hp, Wp, C)``, cls ``(B, C)`` if the model has a class token,
            token_norm ``(B, Hp, Wp)``; the same of each further layer; attention ``(B, H, Hp, Wp)``.
        """
        b, height, width, _ = image.shape
        hp, wp = height // self.patch[0], width // self.patch[1]
        # The Cast comes first: TensorRT feeds uint8 to no other operator.
        x = image.float() - CENTRE
        x = x.reshape(b, hp, self.patch[0], wp, self.patch[1], 3).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, hp * wp, -1)  # (B, N, p * p * 3)
        x = self.patch_norm(x @ self.projection + self.offset)  # (B, N, C)
        given = dict(zip(self.tables, tables))
        if "pos_embed" in given:
            x = x + given["pos_embed"]
        elif self.positions is not None:
            x = x + self.positions
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(b, -1, -1), x], dim=1)  # (B, T, C)
        x = self.norm_pre(x)
        turns = self._turns(given.get("rotary"))
        middle: list[torch.Tensor] = []
        seen = None
        for i, block in enumerate(self.blocks):
            if isinstance(block, DenseReadout):
                x = block(x, turns[i % len(turns)], (hp, wp))
            elif self.class_attention is not None and i + 1 == len(self.blocks):
                x, seen = block(x, turns[i % len(turns)], self.class_attention)
            else:
                x = block(x, turns[i % len(turns)])
            if self.layers is not None and i + 1 in self.layers.blocks:
                middle.extend(self._read(x, (b, hp, wp), self.layers.norm))
        attention = [] if seen is None else [seen[..., self.prefix_count :].reshape(b, -1, hp, wp)]
        return (*self._read(x, (b, hp, wp), True, self.project), *middle, *attention)

    def _read(
        self, x: torch.Tensor, grid: tuple[int, int, int], normed: bool, project: nn.Module | None = None
    ) -> list[torch.Tensor]:
        """Return features, class token if there is one, and token norms of the residual stream ``x`` ``(B, T, C)``."""
        norm = self.norm if normed else nn.Identity()
        project = nn.Identity() if project is None else project
        patches = x[:, self.prefix_count :]  # (B, N, C), without registers
        token_norm = patches.square().sum(-1).sqrt().reshape(grid)
        features = project(norm(patches)).reshape(*grid, -1)
        return [features, *([project(norm(x[:, 0]))] if self.class_token else []), token_norm]

    def _turns(self, rotary: torch.Tensor | None) -> list[Any]:
        """The two tables that each layer's queries and keys are rotated by; one pair if all layers share it."""
        if rotary is not None:
            return list(zip(*(wide.unbind(0) for wide in wide_tables(rotary, self.prefix_count))))
        layers = len(self.turns) // 2
        return list(zip(self.turns[:layers], self.turns[layers:])) or [None]


class ClassAttention(nn.Module):
    """The class token's attention, of its query ``(B, H, 1, D)`` and all keys ``(B, H, T, D)``: ``(B, H, 1, T)``.

    It stands beside the blocks, so that a runtime still recognises the attention inside the last one.
    """

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (query @ keys.transpose(-2, -1)).softmax(-1)


class DenseBlock(nn.Module):
    """A pre-norm block, equal to timm's, with LayerScale folded into its linear layers."""

    def __init__(self, block: ViT, neighbours: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = copy.deepcopy(block.norm1), copy.deepcopy(block.norm2)
        self.attn = DenseAttention(block.attn, neighbours)
        # Only the last layer changes; the others are shared with the model, which saves a third of its memory.
        shared = {id(value): value for name, value in block.mlp.named_parameters() if not name.startswith("fc2.")}
        self.mlp = copy.deepcopy(block.mlp, shared)
        fold_layer_scale(self.attn.proj, layer_scale(block, 1))
        fold_layer_scale(self.mlp.fc2, layer_scale(block, 2))

    def forward(self, x: torch.Tensor, turn: Turn | None, watch: nn.Module | None = None) -> Any:
        if watch is None:
            x = x + self.attn(self.norm1(x), turn)
            return x + self.mlp(self.norm2(x))
        y, seen = self.attn(self.norm1(x), turn, watch)
        x = x + y
        return x + self.mlp(self.norm2(x)), seen


class DenseAttention(nn.Module):
    """Attention with one qkv projection whose query rows are scaled, written out so that each runtime can fuse it.

    ``neighbours``: the model rotates pairs of neighbouring channels, see ``rotation``.
    """

    def __init__(self, attn: ViT, neighbours: bool) -> None:
        super().__init__()
        self.heads, self.head_width = attn.num_heads, attn.head_dim
        width = self.heads * self.head_width
        self.q_norm, self.k_norm = copy.deepcopy(attn.q_norm), copy.deepcopy(attn.k_norm)
        weight, bias = fused_qkv(attn)
        if neighbours:
            for part in (weight, bias):
                if part is not None:
                    part[: 2 * width] = paired_halves(part[: 2 * width], 2 * self.heads)
            reorder_norm(self.q_norm)
            reorder_norm(self.k_norm)
        self.scale = None if isinstance(self.q_norm, nn.Identity) else attn.scale
        if self.scale is None:
            fold_attention_scale(weight, bias, width, attn.scale)
        self.qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.qkv.weight = nn.Parameter(weight)
        if bias is not None:
            self.qkv.bias = nn.Parameter(bias)
        self.norm, self.gate, self.proj = copy.deepcopy(attn.norm), copy.deepcopy(attn.gate), copy.deepcopy(attn.proj)

    def forward(self, x: torch.Tensor, turn: Turn | None, watch: nn.Module | None = None) -> Any:
        b, t, _ = x.shape
        parts = self.qkv(x).chunk(3, dim=-1)
        # Each (B, H, T, D).
        q, k, v = (part.reshape(b, t, self.heads, self.head_width).transpose(1, 2) for part in parts)
        q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if self.scale is not None:
            q = q * self.scale
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        y = self.norm(y.transpose(1, 2).reshape(b, t, -1))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj(y) if watch is None else (self.proj(y), watch(q[:, :, :1], k))
