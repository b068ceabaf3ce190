"""The projection of a traced model's tokens into the space of text. C width, P projected width."""

from __future__ import annotations

import copy

import torch
from torch import nn

from phreg_deploy.models.hooks import ViT


def projection_of(model: ViT) -> Projection | PooledProjection:
    """Return the projection of a model that ``models.readouts.with_readout`` accepted; its weights are copies."""
    return Projection(model.head) if getattr(model, "attn_pool", None) is None else PooledProjection(model)


class Projection(nn.Module):
    """A CLIP's projection into the space of text, of one weight ``(C, P)`` for patch tokens and class token."""

    def __init__(self, head: ViT) -> None:
        super().__init__()
        self.into_text = nn.Parameter(head.weight.detach().T.contiguous())
        self.bias = None if head.bias is None else nn.Parameter(head.bias.detach().clone())
        self.channels = int(head.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.into_text
        return y if self.bias is None else y + self.bias


class PooledProjection(nn.Module):
    """The pooling head of a SigLIP or Perception Encoder, applied to each token alone.

    Attention over one token is its value, whatever the query and the key are.
    """

    def __init__(self, model: ViT) -> None:
        super().__init__()
        pool, width = model.attn_pool, model.embed_dim
        bias = None if pool.kv.bias is None else pool.kv.bias[width:]
        self.value, self.proj = Transposed(pool.kv.weight[width:], bias), Transposed(pool.proj.weight, pool.proj.bias)
        self.norm, self.act = copy.deepcopy(pool.norm), copy.deepcopy(pool.mlp.act)
        self.fc1, self.fc2 = (Transposed(part.weight, part.bias) for part in (pool.mlp.fc1, pool.mlp.fc2))
        self.last = Projection(model.head) if isinstance(model.head, nn.Linear) else None
        self.channels = width if self.last is None else self.last.channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(self.value(x))
        y = y + self.fc2(self.act(self.fc1(self.norm(y))))
        return y if self.last is None else self.last(y)


class Transposed(nn.Module):
    """A linear layer of a weight ``(C, O)``: patch tokens and class token share it in the graph as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().T.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias
