"""Train nothing but the singular values of a model's linear layers. O output channels, I input channels, K values.

The choice of layers is that of the code released with SINDER (arXiv 2407.16826): every linear layer of the blocks but
the projections to queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from phreg_deploy.models.hooks import ViT


class SingularValues(nn.Module):
    """Add a change of the singular values of a weight ``(O, I)`` to it.

    ``change`` ``(K,)`` is the only parameter. At zero, the weight is the original one to the last bit.

    Args:
        weight: the original weight ``(O, I)``.
        first: only the rows from this one on are decomposed; the others stay as they are.
    """

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, weight: torch.Tensor, first: int = 0) -> None:
        super().__init__()
        self.first = first
        # Decomposed in float64, so that the factors are orthogonal to float32's rounding.
        left, values, right = torch.linalg.svd(weight.detach()[first:].double().cpu(), full_matrices=False)
        self.register_buffer("left", left.to(weight))
        self.register_buffer("right", right.to(weight))
        self.change = nn.Parameter(torch.zeros_like(values, dtype=weight.dtype, device=weight.device))

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        with torch.autocast(original.device.type, enabled=False):
            change = (self.left * self.change) @ self.right
            return torch.cat([original[: self.first], original[self.first :] + change])


def train_singular_values(model: ViT) -> list[nn.Parameter]:
    """Freeze every weight, and return new parameters: a change of each layer's singular values, zero at first.

    The model computes the same until they change. ``merge_singular_values`` undoes this.
    """
    model.requires_grad_(False)
    changes = []
    for layer, first in _decomposed(model):
        values = SingularValues(layer.weight, first)
        parametrize.register_parametrization(layer, "weight", values)
        changes.append(values.change)
    return changes


@torch.no_grad()
def merge_singular_values(model: ViT) -> None:
    """Write the changed singular values into plain weights; the model then has the modules and names that it had."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _decomposed(model: ViT) -> Iterator[tuple[nn.Linear, int]]:
    """Yield the layers whose singular values train, each with its first row that is decomposed."""
    for block in model.blocks:
        for name, layer in block.named_modules():
            kind = name.rsplit(".", 1)[-1]
            if not isinstance(layer, nn.Linear) or kind in ("q_proj", "k_proj"):
                continue
            # timm stacks queries, keys and values in equal parts.
            yield layer, layer.out_features * 2 // 3 if kind == "qkv" else 0
