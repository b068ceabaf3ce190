"""SINDER's loss (arXiv 2407.16826): draw defective tokens to their neighbours. No targets are needed.

The values are those of the released code. B batch, L blocks, Hp x Wp patches, C width, M defective tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT

# A token is defective if its |cosine| with the defect's direction exceeds the image's mean by so many deviations.
DEVIATIONS = 4.0
# Fewer defective tokens than this are left alone.
LEAST = 3
# |cosine| at which a neighbour counts for 1/e of one at right angles to the direction.
TEMPERATURE = 0.1
# Neighbours count by exp(-|cosine| / TEMPERATURE) and by this kernel.
KERNEL = ((1.0, 2.0, 1.0), (2.0, 4.0, 2.0), (1.0, 2.0, 1.0))


def neighbour_loss(model: ViT, images: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of normalised ``images`` ``(B, 3, H, W)``; an image without defective tokens has loss 0.

    Only the first block after which an image has ``LEAST`` defective tokens counts for it. There, the loss is the mean
    distance of defective tokens to a weighted mean of the 3 x 3 tokens around them, over the mean norm of tokens. No
    gradient passes through the means. If no image has defective tokens, the result needs no gradient.

    Args:
        directions: of defective tokens after each block, unit vectors ``(L, C)``.
    """
    streams: list[torch.Tensor] = []
    with hooks.block_outputs(model, lambda _i, out: streams.append(out[:, model.num_prefix_tokens :])):
        model.forward_features(images)
    height, width = (side // patch for side, patch in zip(images.shape[-2:], model.patch_embed.patch_size))
    losses = [torch.zeros((), device=images.device)]
    pending = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for stream, direction in zip(streams, directions):
        tokens = stream.float().reshape(len(images), height, width, -1)
        cosines = cosines_with(tokens, direction)
        defective = find_defective(cosines)
        found = pending & (defective.sum((1, 2)) >= LEAST)
        losses += [distance(tokens[i], cosines[i], defective[i]) for i in found.nonzero().flatten().tolist()]
        pending &= ~found
    return torch.stack(losses).sum() / len(images)


@torch.no_grad()
def cosines_with(tokens: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Return the |cosine| of each token with the direction, ``(B, Hp, Wp)``."""
    return torch.cosine_similarity(tokens, direction, dim=-1).abs()


@torch.no_grad()
def find_defective(cosines: torch.Tensor) -> torch.Tensor:
    """Return the mask of defective tokens ``(B, Hp, Wp)``."""
    spread = cosines.std((1, 2), keepdim=True)
    return cosines > cosines.mean((1, 2), keepdim=True) + DEVIATIONS * spread


def distance(tokens: torch.Tensor, cosines: torch.Tensor, defective: torch.Tensor) -> torch.Tensor:
    """Return the loss of one image: tokens ``(Hp, Wp, C)``, their |cosines| and mask ``(Hp, Wp)``."""
    rows, columns = defective.nonzero(as_tuple=True)  # (M,)
    with torch.no_grad():
        steps = torch.arange(-1, 2, device=tokens.device)
        # Indices of a padded map, (M, 3, 3); what is padded has no weight.
        around = (rows[:, None, None] + 1 + steps[:, None], columns[:, None, None] + 1 + steps)
        strengths = F.pad((-cosines / TEMPERATURE).exp(), (1, 1, 1, 1))
        weights = strengths[around] * torch.tensor(KERNEL, device=tokens.device)
        weights /= weights.sum((1, 2), keepdim=True)
        means = (weights[..., None] * F.pad(tokens, (0, 0, 1, 1, 1, 1))[around]).sum((1, 2))  # (M, C)
        scale = tokens.norm(dim=-1).mean()
    return (tokens[rows, columns] - means).norm(dim=-1).mean() / scale
