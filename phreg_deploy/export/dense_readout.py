"""The last block of a traced model whose readout is ``value`` or ``neighbour`` (``models.readouts``).

Axes: B batch, (Hp, Wp) patch grid, N = Hp * Wp, T = 1 + R + N tokens, C width, H heads, D head width.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from phreg_deploy.export.folding import fold_layer_scale, fused_qkv, layer_scale
from phreg_deploy.export.rotation import Turn, paired_halves, reorder_norm, rotate
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.readouts import neighbour_window
from phreg_deploy.readout import VALUE, Readout


class DenseReadout(nn.Module):
    """A last block of norm, attention by the readout and output projection, without residual and MLP.

    Args:
        block: timm's block; not changed.
        prefix: class token and registers before the patches.
        neighbours: the model rotates pairs of neighbouring channels, see ``rotation``.
        grid: (Hp, Wp), for which the window of ``neighbour`` is computed now; None to compute it in the graph.
    """

    def __init__(
        self, block: ViT, readout: Readout, prefix: int, neighbours: bool, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.norm1 = copy.deepcopy(block.norm1)
        kind = ValueAttention if readout.name == VALUE else NeighbourAttention
        self.attn = kind(block.attn, prefix, neighbours, grid)
        fold_layer_scale(self.attn.proj, layer_scale(block, 1))

    def forward(self, x: torch.Tensor, turn: Turn | None, grid: tuple[int, int]) -> torch.Tensor:
        return self.attn(self.norm1(x), turn, grid)


class ValueAttention(nn.Module):
    """``proj(v(x))``: each token reads its own value only."""

    def __init__(self, attn: ViT, _prefix: int, _neighbours: bool, _grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.value = _linear(attn, attn.num_heads * attn.head_dim, 2)
        self.norm, self.gate, self.proj = copy.deepcopy(attn.norm), copy.deepcopy(attn.gate), copy.deepcopy(attn.proj)

    def forward(self, x: torch.Tensor, _turn: Turn | None, _grid: tuple[int, int]) -> torch.Tensor:
        y = self.norm(self.value(x))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj(y)


class NeighbourAttention(nn.Module):
    """Attention of keys to keys, plus a Gaussian window around each patch."""

    def __init__(self, attn: ViT, prefix: int, neighbours: bool, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.heads, self.head_width, self.prefix, self.scale = attn.num_heads, attn.head_dim, prefix, attn.scale
        width = self.heads * self.head_width
        self.key, self.value = _linear(attn, width, 1), _linear(attn, width, 2)
        self.k_norm = copy.deepcopy(attn.k_norm)
        if neighbours:
            for part in (self.key.weight, self.key.bias):
                if part is not None:
                    part.data = paired_halves(part.data, self.heads)
            reorder_norm(self.k_norm)
        self.norm, self.gate, self.proj = copy.deepcopy(attn.norm), copy.deepcopy(attn.gate), copy.deepcopy(attn.proj)
        window = None if grid is None else nn.Parameter(neighbour_window(grid, prefix, torch.device("cpu")))
        self.window = window

    def forward(self, x: torch.Tensor, turn: Turn | None, grid: tuple[int, int]) -> torch.Tensor:
        b, t, _ = x.shape
        k, v = (
            part.reshape(b, t, self.heads, self.head_width).transpose(1, 2) for part in (self.key(x), self.value(x))
        )
        k = self.k_norm(k)
        if turn is not None:
            k = rotate(k, turn)
        window = neighbour_window(grid, self.prefix, x.device) if self.window is None else self.window
        y = ((k * self.scale) @ k.transpose(-2, -1) + window).softmax(-1) @ v
        y = self.norm(y.transpose(1, 2).reshape(b, t, -1))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj(y)


def _linear(attn: ViT, width: int, part: int) -> nn.Linear:
    """Return the projection to queries (0), keys (1) or values (2) as a layer of its own."""
    weight, bias = fused_qkv(attn)
    rows = slice(part * width, (part + 1) * width)
    linear = nn.Linear(weight.shape[1], width, bias=bias is not None)
    linear.weight = nn.Parameter(weight[rows].clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias[rows].clone())
    return linear
