"""Fold constant operations into the weights, exactly, so that they cost nothing per frame.

Axes: C width, H heads, D head width, p patch side.
"""

from __future__ import annotations

import torch

from phreg_deploy.models.hooks import ViT

# Subtracted from the pixels. -128 to 127 are exact in BF16's 8 bits of mantissa, and the smaller values leave a smaller
# bias, which costs less precision.
CENTRE = 128


def fold_normalisation(
    projection: ViT, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold pixel scaling, mean and standard deviation into the patch projection.

    Returns:
        weight ``(p * p * 3, C)`` and bias ``(C,)``, computed in float64, stored in float32. They take pixels 0-255
        minus ``CENTRE``, in the order (row, column, RGB).
    """
    weight = projection.weight.detach().double()  # (C, 3, p, p)
    centre = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1) - CENTRE / 255
    spread = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    bias = -(weight * centre / spread).sum((1, 2, 3))
    if projection.bias is not None:
        bias = bias + projection.bias.detach().double()
    scaled = (weight / (255 * spread)).permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
    return scaled.float(), bias.float()


def fold_layer_scale(linear: ViT, gamma: torch.Tensor | None) -> None:
    """Fold LayerScale into the linear layer before it, in place: gamma * (W x + b) = (gamma W) x + gamma b."""
    if gamma is None:
        return
    with torch.no_grad():
        scale = gamma.detach().double()
        linear.weight.copy_(linear.weight.double() * scale[:, None])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() * scale)


def layer_scale(block: ViT, which: int) -> torch.Tensor | None:
    """Return the LayerScale after a block's attention (1) or MLP (2), ``(C,)``; None if there is none."""
    gamma = getattr(getattr(block, f"ls{which}", None), "gamma", None)
    return getattr(block, f"gamma_{which}", None) if gamma is None else gamma


def fold_attention_scale(weight: torch.Tensor, bias: torch.Tensor | None, width: int, scale: float) -> None:
    """Fold the factor 1 / sqrt(D) into the query rows of a qkv projection, in place.

    Exact only if no norm follows the queries; a rotation (RoPE) commutes with the factor.

    Args:
        weight: ``(3 * H * D, C)``, the queries first.
        width: H * D.
    """
    with torch.no_grad():
        weight[:width] *= scale
        if bias is not None:
            bias[:width] *= scale


def fused_qkv(attn: ViT) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return copies of weight ``(3 * H * D, C)`` and bias of the queries, keys and values of timm's attention.

    Keys and values that several heads share (grouped-query attention, Sapiens2) are repeated for each head: the
    products of the attention stay those that every runtime fuses.
    """
    if attn.qkv is not None:
        weight, bias = attn.qkv.weight.detach().clone(), attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        return weight, None if bias is None else bias.detach().clone()
    weights, biases, any_bias = [], [], False
    for part in (attn.q_proj, attn.k_proj, attn.v_proj):
        groups = attn.num_heads * attn.head_dim // len(part.weight)
        any_bias = any_bias or part.bias is not None
        bias = torch.zeros(len(part.weight)) if part.bias is None else part.bias.detach()
        weights.append(_repeat_heads(part.weight.detach(), attn.head_dim, groups))
        biases.append(_repeat_heads(bias, attn.head_dim, groups))
    return torch.cat(weights), torch.cat(biases) if any_bias else None


def _repeat_heads(rows: torch.Tensor, head: int, times: int) -> torch.Tensor:
    """Repeat the rows ``(H * D, ...)`` of each head, so that heads that share a key or value follow each other."""
    parts = rows.reshape(-1, head, *rows.shape[1:])
    return parts.repeat_interleave(times, dim=0).reshape(-1, *rows.shape[1:])


def prefix_tokens(model: ViT) -> torch.Tensor | None:
    """Return class token and R registers with their position embedding, ``(1, 1 + R, C)``; None if there are none."""
    parts = [token for token in (model.cls_token, model.reg_token) if token is not None]
    if not parts:
        return None
    tokens = torch.cat([part.detach() for part in parts], dim=1).clone()
    if model.pos_embed is not None and not model.no_embed_class:
        tokens += model.pos_embed.detach()[:, : tokens.shape[1]]
    return tokens


def patch_positions(model: ViT) -> torch.Tensor | None:
    """Return the patches' position embedding at the model's input size, ``(1, N, C)``; None if there is none."""
    if model.pos_embed is None:
        return None
    skipped = 0 if model.no_embed_class else model.num_prefix_tokens
    return model.pos_embed.detach()[:, skipped:].clone()
