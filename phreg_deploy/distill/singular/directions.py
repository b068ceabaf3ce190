"""Predict the direction of defective tokens from the weights alone (arXiv 2407.16826). L blocks, C width."""

from __future__ import annotations

import torch
from torch import nn

from phreg_deploy.models.hooks import ViT

# Random inputs of the least-squares fits; SINDER's code takes 100,000.
SAMPLES = 20_000


@torch.no_grad()
def defect_directions(model: ViT, *, mlps: bool = True, centred: bool = False) -> torch.Tensor:
    """Return the direction of defective tokens after each block, unit vectors ``(L, C)``, float32 on the CPU.

    Each block is linearised as a token alone in its image passes it. The direction after a block is the leading left
    singular vector of the product of the blocks up to there.

    Args:
        mlps: False leaves the MLPs out of the product, for a comparison.
        centred: let layer norms subtract the mean of the channels, as in the code released with the paper.
    """
    device = next(model.parameters()).device
    inputs = torch.randn(SAMPLES, model.embed_dim, generator=torch.Generator().manual_seed(0)).to(device)
    inputs -= inputs.mean(0)
    product, directions = torch.eye(model.embed_dim, dtype=torch.float64), []
    for block in model.blocks:
        for i, part in enumerate((block.attn, block.mlp) if mlps else (block.attn,), 1):
            product = product + _branch(block, i, part, inputs, centred) @ product
        product = product / product.norm()
        directions.append(torch.linalg.svd(product)[0][:, 0])
    return torch.stack(directions).float()


def _branch(block: ViT, number: int, part: nn.Module, inputs: torch.Tensor, centred: bool) -> torch.Tensor:
    """Return the linear map ``(C, C)`` of attention (1) or MLP (2) with norm and LayerScale; float64 on the CPU."""
    # A token alone attends to itself only, so its attention is linear unless it has an inner norm or a gate.
    outputs = part(inputs[:, None])[:, 0].double().cpu()
    x = inputs.double().cpu()
    linear = torch.linalg.solve(x.T @ x, x.T @ (outputs - outputs.mean(0))).T
    norm = getattr(block, f"norm{number}")
    if getattr(norm, "weight", None) is not None:
        linear = linear * norm.weight.double().cpu()
    # A norm's division by the channels' spread is left out.
    if centred and isinstance(norm, nn.LayerNorm):
        linear = linear - linear.mean(1, keepdim=True)
    scale = getattr(getattr(block, f"ls{number}", None), "gamma", None)
    scale = getattr(block, f"gamma_{number}", None) if scale is None else scale
    return linear if scale is None else scale.double().cpu()[:, None] * linear
