"""Exact folds: algebra that moves work from every frame into the weights. Each has a numerical test.

C width, H heads, D head width, p patch side.
"""

from __future__ import annotations

import torch

from phreg_deploy.models.hooks import ViT

CENTRE = (
    128  # taken off the pixels: what is left is exact in 8 bits of mantissa, and so small that the bias cancels little
)


def fold_normalisation(
    projection: ViT, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel scaling, mean and standard deviation into the patch projection.

    Returns:
        weight ``(p * p * 3, C)`` and bias ``(C,)``, float32, for raw values 0-255 less ``CENTRE``, laid out (row, column, RGB);
        computed in float64.
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
    """LayerScale into the linear layer before it, in place: gamma * (W x + b) = (gamma W) x + gamma b."""
    if gamma is None:
        return
    with torch.no_grad():
        scale = gamma.detach().double()
        linear.weight.copy_(linear.weight.double() * scale[:, None])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() * scale)


def fold_attention_scale(weight: torch.Tensor, bias: torch.Tensor | None, width: int, scale: float) -> None:
    """1 / sqrt(D) into the query rows of a fused qkv projection, in place. ``weight`` ``(3 * H * D, C)``; queries first.

    Only where no norm follows the queries; a rotation (RoPE) commutes with it.
    """
    with torch.no_grad():
        weight[:width] *= scale
        if bias is not None:
            bias[:width] *= scale


def prefix_tokens(model: ViT) -> torch.Tensor | None:
    """Class token and registers with their position embedding, ``(1, 1 + R, C)``; None where there are none."""
    parts = [token for token in (model.cls_token, model.reg_token) if token is not None]
    if not parts:
        return None
    tokens = torch.cat([part.detach() for part in parts], dim=1).clone()
    if model.pos_embed is not None and not model.no_embed_class:
        tokens += model.pos_embed.detach()[:, : tokens.shape[1]]
    return tokens


def patch_positions(model: ViT) -> torch.Tensor | None:
    """Position embedding of the patches at the model's present size, ``(1, N, C)``; None where there is none."""
    if model.pos_embed is None:
        return None
    skipped = 0 if model.no_embed_class else model.num_prefix_tokens
    return model.pos_embed.detach()[:, skipped:].clone()
