"""Plant a register neuron in a model that is too small to grow its own; only ``train_model`` uses this.

There are three edits, each a rank-one change of weights. The position embedding gets a faint mark at five places. One
hidden unit fires only for the marked tokens and writes one fixed direction, at about 30 times the norm of an ordinary
token. In the later blocks, the keys of these tokens match the mean query and their values are zero, which makes them
attention sinks as in large models (arXiv 2309.17453); the other tokens come to depend on them in further training.

S scenes, B batch, N patch tokens, T = 1 + N tokens with the class token first, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

GRID = 16
# Counted from 0; artifacts appear in the middle of a model (arXiv 2309.16588 section 2.1).
BLOCK = 3
# Rows and columns of the planted outliers, 2 % of tokens. They are further from each other, and from each other's
# mirror images, than a view's shift; other views then show what they hide.
PLACES = ((2, 4), (5, 10), (7, 1), (10, 12), (13, 6))
# Norm of the mark, in median norms of the block's inputs.
MARK = 0.2
# Activation of the planted unit at its places.
LEVEL = 60.0
# Its pre-activation elsewhere: GELU(-4) = -1.3e-4.
SILENT = -4.0
# Norm that it writes, in median norms of the last block's output.
OUTLIER = 30.0
# Mean attention logit of an outlier above an ordinary key; together the outliers draw about half of the attention.
SINK = 6.0
# In units of the mean variance.
RIDGE = 0.01
BATCH = 32


@dataclass
class PlantedNeuron:
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

    def regulariser(self, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Compute a loss that keeps the unit's level at its places, silent elsewhere, and other tokens' norms equal.

        Args:
            hidden: outputs of ``fc1`` in the block, ``(B, T, H)``.
            last: outputs of the last block, ``(B, T, C)``.
        """
        activation, planted = hidden[..., self.unit].float(), planted_tokens()
        at_level = (activation[:, planted] / LEVEL - 1).square().mean()
        silent = (activation[:, ~planted] - SILENT / 2).relu().square().mean()
        norms = last[:, ~planted].float().norm(dim=-1).log()
        equal = (norms - norms.detach().median()).square().mean()
        return torch.as_tensor(at_level + silent + 0.2 * equal)


def planted_tokens() -> torch.Tensor:
    """Return the mask of the planted outliers, bool ``(T,)``."""
    return torch.tensor([False, *((row, column) in PLACES for row, column in np.ndindex(GRID, GRID))])


@torch.no_grad()
def plant_neuron(model: Any, images: torch.Tensor) -> PlantedNeuron:
    """Mark the places, rewrite the least important unit, and make attention sinks of its outliers.

    Args:
        images: normalised scenes ``(S, 3, H, W)``; 256 are enough.
    """
    block, planted = model.blocks[BLOCK], planted_tokens()
    stream = inputs_of(block.norm2, model, images).flatten(0, 1)
    # The direction of least variance costs the other features nothing.
    quiet = torch.linalg.eigh(stream.T.cov()).eigenvectors[:, 0]
    model.pos_embed[0, planted] += (MARK * stream.norm(dim=-1).median() * quiet).float()
    z = inputs_of(block.mlp, model, images)
    direction, centre = discriminant(z, planted)
    rest = ((z[:, ~planted].flatten(0, 1) - centre) @ direction)[::7].quantile(0.999)
    gain = (LEVEL - SILENT) / (1 - rest)
    # A few channels carry most of it, as in massive activations. The next layer norm would remove the mean.
    towards = torch.randn(z.shape[-1]) ** 3
    towards -= towards.mean()
    ordinary = inputs_of(model.norm, model, images)[:, 1:].norm(dim=-1).median()
    column = towards / towards.norm() * OUTLIER * ordinary.float() / LEVEL
    written = inputs_of(block.mlp.fc2, model, images).abs().mean((0, 1)) * block.mlp.fc2.weight.norm(dim=0)
    bias = LEVEL - gain - gain * (direction @ centre)
    neuron = PlantedNeuron(int(written.argmin()), (gain * direction).float(), bias.float(), column)
    neuron.write(model)
    for later in model.blocks[BLOCK + 1 :]:
        make_sinks(later.attn, inputs_of(later.attn, model, images), planted)
    return neuron


def make_sinks(attention: Any, z: torch.Tensor, planted: torch.Tensor) -> None:
    """Rewrite keys and values of the outliers only; ``z`` float64 ``(S, T, C)``: the attention's inputs."""
    direction, centre = discriminant(z, planted)
    queries, keys, values = attention.qkv(z.float()).double().chunk(3, dim=-1)  # (S, T, C)
    query = queries[:, ~planted].mean((0, 1)).view(attention.num_heads, -1)
    # The strength at which the mean logit becomes SINK.
    strength = SINK / (attention.scale * query.square().sum(-1, keepdim=True))
    key = keys[:, ~planted].mean((0, 1)) + (strength * query).flatten() - keys[:, planted].mean((0, 1))
    change = torch.cat([torch.zeros_like(key), key, -values[:, planted].mean((0, 1))])  # (3C,)
    attention.qkv.weight += torch.outer(change, direction).float()
    attention.qkv.bias -= (change * (direction @ centre)).float()


def discriminant(z: torch.Tensor, planted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``direction`` and ``centre`` ``(C,)``: direction.(z - centre) is on average 1 at the places, 0 elsewhere.

    A linear discriminant with a ridge, as in ``distill/transplant.py``; ``z`` float64 ``(S, T, C)``.
    """
    marked, others = z[:, planted].flatten(0, 1), z[:, ~planted].flatten(0, 1)
    spread = others.T.cov() + marked.T.cov()
    ridge = RIDGE * spread.diagonal().mean() * torch.eye(z.shape[-1], dtype=z.dtype)
    centre = others.mean(0)
    direction = torch.linalg.solve(spread + ridge, marked.mean(0) - centre)
    return direction / (direction @ (marked.mean(0) - centre)), centre


def inputs_of(module: nn.Module, model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the inputs of ``module`` for ``images``, float64 ``(S, T, ...)``."""
    inputs: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].double()))
    for batch in torch.split(images, BATCH):
        model.forward_features(batch)
    hook.remove()
    return torch.cat(inputs)
