"""Read dense features out of a ViT's last block as MaskCLIP and NACLIP do (see ``phreg_deploy.readout``).

B batch, N patch tokens, T = [class] + R + N tokens, C width, H heads, D head width, P projected width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import Mlp
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import nn

from phreg_deploy.errors import PhregError
from phreg_deploy.readout import FINAL, PLAIN, VALUE, WINDOW_STD, Readout

# A timm VisionTransformer or Eva, or a part of one.
ViT = Any
ATTRIBUTE = "phreg_readout"


def with_readout(model: ViT, readout: Readout) -> ViT:
    """Return the model with another readout; both share every weight. ``hooks.forward`` follows it.

    Raises:
        PhregError: the model has no projection that can be applied to each token.
    """
    if readout.project:
        _check_projection(model)
    view = copy.copy(model)
    setattr(view, ATTRIBUTE, readout)
    return view


def readout_of(model: ViT) -> Readout:
    """Return the readout that ``with_readout`` gave to a model or to what it was copied from; else the plain one."""
    return getattr(model, ATTRIBUTE, PLAIN)


@contextmanager
def last_block(model: ViT, readout: Readout) -> Iterator[None]:
    """While open, the model's last block computes the readout; parameters and state dict do not change."""
    if readout.name == FINAL:
        yield
        return
    block, grid, prefix = model.blocks[-1], tuple(model.patch_embed.grid_size), model.num_prefix_tokens

    def forward(x: torch.Tensor, rope: torch.Tensor | None = None, **_unused: Any) -> torch.Tensor:
        normed = block.norm1(x)
        if readout.name == VALUE:
            y = _values(block.attn, normed)
        else:
            window = neighbour_window(grid, prefix, x.device)
            y = _neighbours(block.attn, normed, rope, window)
        y = _finish(block.attn, normed, y)
        if getattr(block, "gamma_1", None) is not None:
            return block.gamma_1 * y
        return block.ls1(y) if hasattr(block, "ls1") else y

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def neighbour_window(grid: tuple[int, int], prefix: int, device: torch.device) -> torch.Tensor:
    """Return what NACLIP adds to the attention scores, ``(T, T)``: a Gaussian of each pair of patches' distance.

    Class token and registers get 0. The window is exp(-d^2 / (2 std^2)) for a distance of d patches.
    """
    rows, columns = (_gaussian(side, device) for side in grid)
    window = rows[:, None, :, None] * columns[None, :, None, :]  # (Hp, Wp, Hp, Wp)
    count = grid[0] * grid[1]
    return F.pad(window.reshape(count, count), (prefix, 0, prefix, 0))


def _gaussian(side: int, device: torch.device) -> torch.Tensor:
    places = torch.arange(side, device=device, dtype=torch.float32)
    return torch.exp(-(places[:, None] - places[None]).square() / (2 * WINDOW_STD**2))


def project(model: ViT, tokens: torch.Tensor) -> torch.Tensor:
    """Apply the model's projection to normed tokens ``(B, T, C)``: ``(B, T, P)``.

    The pooling head of a SigLIP or Perception Encoder is applied to each token as if it were the only one.
    """
    if getattr(model, "attn_pool", None) is None:
        return model.head(tokens)
    count, length, width = tokens.shape
    return model.head(model.attn_pool(tokens.reshape(-1, 1, width)).reshape(count, length, -1))


def _split(attn: ViT, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values ``(B, H, T, D)``, before norm and rotation of the keys."""
    b, t, _ = x.shape

    def heads(part: torch.Tensor) -> torch.Tensor:
        return part.reshape(b, t, -1, attn.head_dim).transpose(1, 2)

    if attn.qkv is None:
        return heads(attn.k_proj(x)), heads(attn.v_proj(x))
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(x)
    else:
        qkv = F.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    _, keys, values = qkv.chunk(3, dim=-1)
    return heads(keys), heads(values)


def _repeat(part: torch.Tensor, attn: ViT) -> torch.Tensor:
    """Repeat keys or values that several heads share (grouped-query attention)."""
    return part.repeat_interleave(attn.num_heads // part.shape[1], dim=1)


def _values(attn: ViT, x: torch.Tensor) -> torch.Tensor:
    return _repeat(_split(attn, x)[1], attn)


def _neighbours(attn: ViT, x: torch.Tensor, rope: torch.Tensor | None, window: torch.Tensor) -> torch.Tensor:
    keys, values = _split(attn, x)
    keys = attn.k_norm(keys)
    if rope is not None:
        count, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        turned = apply_rot_embed_cat(keys[:, :, count:], rope, half=half)
        keys = torch.cat([keys[:, :, :count], turned], dim=2).type_as(values)
    keys, values = _repeat(keys, attn), _repeat(values, attn)
    return F.scaled_dot_product_attention(keys, keys, values, window.type_as(values), scale=attn.scale)


def _finish(attn: ViT, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Join the heads ``(B, H, T, D)`` and apply what follows them in timm's attention of the normed tokens ``x``."""
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y))


def _check_projection(model: ViT) -> None:
    name, pool = str(model.pretrained_cfg.get("architecture")), getattr(model, "attn_pool", None)
    use = (
        "expected a CLIP whose head is a linear projection, such as vit_base_patch16_clip_quickgelu_224.openai, or a "
        "SigLIP with its pooling head, such as vit_base_patch16_siglip_224.webli"
    )
    if pool is None:
        if "clip" not in name or "siglip" in name or not isinstance(model.head, nn.Linear):
            raise PhregError(f"project: {name} has no projection into a space of text; {use}.")
        return
    # timm's SigLIP ends with the pooling head, and its Perception Encoder with a projection after it.
    ends = nn.Identity if "siglip" in name else (nn.Identity, nn.Linear)
    known = isinstance(pool, AttentionPoolLatent) and pool.pos_embed is None and pool.latent_len == 1
    known = known and type(pool.mlp) is Mlp and isinstance(pool.mlp.norm, nn.Identity)
    known = known and isinstance(model.fc_norm, nn.Identity) and isinstance(model.head, ends)
    if not known or not ("siglip" in name or "_pe_core_" in name):
        raise PhregError(
            f"project: {name} ends with {type(pool).__name__} and {type(model.head).__name__}, which are no projection "
            f"into a space of text; {use}."
        )
