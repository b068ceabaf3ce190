"""Rotate queries and keys by two products, a sum and one exchange of halves.

timm pairs the channels of a head in two ways. Here channel ``i`` is always paired with ``i + D / 2``: the query and key
rows of a model that pairs neighbours are reordered at export, which no attention score can tell. Strided slices would
remain otherwise. B batch, H heads, T tokens, P prefix tokens, N patches, D head width.
"""

from __future__ import annotations

import torch

from phreg_deploy.models.hooks import ViT

# The two tables that a layer's queries and keys are rotated by, see ``rotate``.
Turn = tuple[torch.Tensor, torch.Tensor]


def paired_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows ``(H * D, ...)`` of queries or keys so that neighbours come to be ``D / 2`` apart."""
    rows = weight.reshape(heads, -1, 2, *weight.shape[1:])  # (H, D / 2, 2, ...)
    return rows.transpose(1, 2).reshape(weight.shape)


def reorder_norm(norm: ViT) -> None:
    """Reorder the weights of a norm over the channels of one head, in place, as ``paired_halves`` does."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(paired_halves(parameter, 1))


def wide_tables(table: torch.Tensor, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a head's channels, and the same with exchanged halves, are multiplied by, each ``(L, H, T, D)``.

    Args:
        table: sines and cosines ``(2, L, H, N, D / 2)``.
        prefix: P; class token and registers come first and are not turned.
    """
    sines, cosines = table[0], table[1]
    if prefix:
        still = torch.zeros(*sines.shape[:2], prefix, sines.shape[3])
        sines, cosines = torch.cat([still, sines], dim=2), torch.cat([still + 1, cosines], dim=2)
    return torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1)


def rotate(x: torch.Tensor, by: Turn) -> torch.Tensor:
    """Rotate ``x`` ``(B, H, T, D)`` by one layer's two tables ``(H, T, D)``."""
    first, second = x.chunk(2, dim=-1)
    return x * by[0] + torch.cat([second, first], dim=-1) * by[1]
