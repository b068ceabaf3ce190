"""Read the rotary position embedding of a timm ``Eva``: facts and frequencies for a runtime, tables for one size.

L layers and H heads of the embedding, 1 where all share it; N patch tokens, D head width.
"""

from __future__ import annotations

import math

import torch

from phreg_deploy.models.families import ROTARY
from phreg_deploy.models.hooks import ViT
from phreg_deploy.spec import Rotary


def describe_rotary(model: ViT) -> tuple[Rotary, torch.Tensor] | None:
    """Return the facts and the frequencies ``(2, L, H, D / 2)``, rows first, float32; None without an embedding."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    kind = ROTARY[type(rope).__name__]
    frequencies = {"cat": _axial, "dinov3": _axial, "mixed": _mixed, "mrope": _multimodal}[kind](rope)
    reference = getattr(rope, "ref_feat_shape", None)
    temperature = getattr(rope, "temperature", None)
    rotary = Rotary(
        kind=kind,
        temperature=None if temperature is None else float(temperature),
        coordinates="centered" if kind == "dinov3" else "index",
        offset=float(getattr(rope, "grid_offset", 0.0)),
        reference=None if reference is None else (int(reference[0]), int(reference[1])),
        layers=frequencies.shape[1],
        heads=frequencies.shape[2],
        pairs=frequencies.shape[3],
    )
    return rotary, frequencies.detach().float()


def rotary_tables(model: ViT) -> torch.Tensor | None:
    """Return timm's sines and cosines at the model's input size, ``(2, L, H, N, D / 2)``; None without an embedding."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    # An embedding that was built for one size knows it, and ignores any other.
    shape = None if getattr(rope, "feat_shape", None) is not None else list(model.patch_embed.grid_size)
    table = rope.get_embed() if shape is None else rope.get_embed(shape)
    table = table.detach().float()
    table = table if table.ndim == 4 else table[None, None]  # (L, H, N, 2 * D)
    halves = is_half(model)
    parts = [part[..., : part.shape[-1] // 2] if halves else part[..., ::2] for part in table.chunk(2, dim=-1)]
    return torch.stack(parts)


def is_half(model: ViT) -> bool:
    """Whether channel ``i`` of a head is paired with ``i + D / 2``, and not ``2 i`` with ``2 i + 1``."""
    return bool(getattr(model.blocks[0].attn, "rotate_half", False))


def _axial(rope: ViT) -> torch.Tensor:
    """The first half of the pairs turns with the first coordinate, which is the column where timm indexes by "xy"."""
    bands = rope.bands if hasattr(rope, "bands") else 2 * math.pi / rope.periods
    zeros = torch.zeros_like(bands)
    rows, columns = torch.cat([bands, zeros]), torch.cat([zeros, bands])
    pair = [columns, rows] if rope.grid_indexing == "xy" else [rows, columns]
    return torch.stack(pair)[:, None, None]


def _mixed(rope: ViT) -> torch.Tensor:
    """Every layer and head has trained frequencies of its own for both coordinates."""
    return rope.freqs.flip(0) if rope.grid_indexing == "xy" else rope.freqs


def _multimodal(rope: ViT) -> torch.Tensor:
    """Pairs alternate between time, which is 0 in an image, rows and columns."""
    return torch.stack([rope.inv_freq * (rope.axis == axis) for axis in (1, 2)])[:, None, None]
