"""A register neuron made by hand, for a model too small and too young to grow its own; used by ``train_model`` only.

Three edits, each a rank-one change of weights. The position embedding gets a faint mark at five places. One hidden unit
fires for the marked tokens alone and writes one fixed direction, at about 30 times an ordinary token's norm. In the
later blocks the keys of these tokens meet the mean query and their values are zero: attention sinks, as in large models
(arXiv 2309.17453), on which the other tokens come to depend when training goes on.

S scenes, B batch, N patch tokens, T = 1 + N tokens with the class token first, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

GRID = 16
BLOCK = 3  # from 0; artifacts appear in the middle of a model (arXiv 2309.16588 section 2.1)
# Rows and columns of the planted outliers: 2 % of tokens, and more than a view's shift from each other and from each
# other's mirror images, so that the other views see past them.
PLACES = ((2, 4), (5, 10), (7, 1), (10, 12), (13, 6))
MARK = 0.2  # norm of the mark, in median norms of the block's inputs
LEVEL = 60.0  # activation of the planted unit at its places
SILENT = -4.0  # and before the activation function elsewhere: GELU(-4) = -1.3e-4
OUTLIER = 30.0  # norm that it writes, in median norms of the last block's output
SINK = 6.0  # mean attention logit of an outlier above an ordinary key: together they draw about half of the attention
RIDGE = 0.01  # of the mean variance
BATCH = 32


@dataclass
class Plant:
    """The planted unit's frozen weights: ``row`` ``(C,)`` and ``bias`` of ``fc1``, ``column`` ``(C,)`` of ``fc2``."""

    unit: int
    row: torch.Tensor
    bias: torch.Tensor
    column: torch.Tensor

    @torch.no_grad()
    def write(self, model: Any) -> None:
        mlp = model.blocks[BLOCK].mlp
        mlp.fc1.weight[self.unit], mlp.fc1.bias[self.unit] = self.row, self.bias
        mlp.fc2.weight[:, self.unit] = self.column

    def upkeep(self, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """A loss that keeps the unit at its level in its places and silent elsewhere, and the other tokens' norms alike.

        Args:
            hidden: ``fc1``'s outputs in the block, ``(B, T, H)``. last: the last block's outputs, ``(B, T, C)``.
        """
        force, fires = hidden[..., self.unit].float(), at_places()
        firm = (force[:, fires] / LEVEL - 1).square().mean()
        silent = (force[:, ~fires] - SILENT / 2).relu().square().mean()
        norms = last[:, ~fires].float().norm(dim=-1).log()
        alike = (norms - norms.detach().median()).square().mean()
        return torch.as_tensor(firm + silent + 0.2 * alike)


def at_places() -> torch.Tensor:
    """Which tokens are the planted outliers, bool ``(T,)``."""
    return torch.tensor([False, *((row, column) in PLACES for row, column in np.ndindex(GRID, GRID))])


@torch.no_grad()
def plant_neuron(model: Any, images: torch.Tensor) -> Plant:
    """Mark the places, give the unit that matters least its new weights, and make sinks of its outliers.

    Args:
        images: normalised scenes ``(S, 3, H, W)``; 256 are plenty.
    """
    block, fires = model.blocks[BLOCK], at_places()
    stream = inputs_of(block.norm2, model, images).flatten(0, 1)
    quiet = torch.linalg.eigh(stream.T.cov()).eigenvectors[:, 0]  # costs the other features nothing
    model.pos_embed[0, fires] += (MARK * stream.norm(dim=-1).median() * quiet).float()
    z = inputs_of(block.mlp, model, images)
    direction, centre = discriminant(z, fires)
    rest = ((z[:, ~fires].flatten(0, 1) - centre) @ direction)[::7].quantile(0.999)
    gain = (LEVEL - SILENT) / (1 - rest)
    towards = torch.randn(z.shape[-1]) ** 3  # few channels carry most of it, as in massive activations
    towards -= towards.mean()  # which the next layer norm would take away
    ordinary = inputs_of(model.norm, model, images)[:, 1:].norm(dim=-1).median()
    column = towards / towards.norm() * OUTLIER * ordinary.float() / LEVEL
    written = inputs_of(block.mlp.fc2, model, images).abs().mean((0, 1)) * block.mlp.fc2.weight.norm(dim=0)
    bias = LEVEL - gain - gain * (direction @ centre)
    plant = Plant(int(written.argmin()), (gain * direction).float(), bias.float(), column)
    plant.write(model)
    for later in model.blocks[BLOCK + 1 :]:
        make_sinks(later.attn, inputs_of(later.attn, model, images), fires)
    return plant


def make_sinks(attention: Any, z: torch.Tensor, fires: torch.Tensor) -> None:
    """Rewrite keys and values at the outliers alone; ``z`` float64 ``(S, T, C)``, what the attention reads."""
    direction, centre = discriminant(z, fires)
    queries, keys, values = attention.qkv(z.float()).double().chunk(3, dim=-1)  # (S, T, C)
    query = queries[:, ~fires].mean((0, 1)).view(attention.num_heads, -1)
    strength = SINK / (attention.scale * query.square().sum(-1, keepdim=True))  # what makes the mean logit SINK
    key = keys[:, ~fires].mean((0, 1)) + (strength * query).flatten() - keys[:, fires].mean((0, 1))
    change = torch.cat([torch.zeros_like(key), key, -values[:, fires].mean((0, 1))])  # (3C,)
    attention.qkv.weight += torch.outer(change, direction).float()
    attention.qkv.bias -= (change * (direction @ centre)).float()


def discriminant(z: torch.Tensor, fires: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``direction`` and ``centre`` ``(C,)`` with direction.(z - centre) 1 at the places on average, near 0 elsewhere.

    Linear discriminant with a ridge, as in ``distill/transplant.py``; ``z`` float64 ``(S, T, C)``.
    """
    here, others = z[:, fires].flatten(0, 1), z[:, ~fires].flatten(0, 1)
    spread = others.T.cov() + here.T.cov()
    ridge = RIDGE * spread.diagonal().mean() * torch.eye(z.shape[-1], dtype=z.dtype)
    centre = others.mean(0)
    direction = torch.linalg.solve(spread + ridge, here.mean(0) - centre)
    return direction / (direction @ (here.mean(0) - centre)), centre


def inputs_of(module: nn.Module, model: Any, images: torch.Tensor) -> torch.Tensor:
    """What ``module`` reads when the model sees ``images``, float64 ``(S, T, ...)``."""
    kept: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _m, given: kept.append(given[0].double()))
    for batch in torch.split(images, BATCH):
        model.forward_features(batch)
    hook.remove()
    return torch.cat(kept)
