"""Compare outlier tokens with what SINDER (arXiv 2407.16826) predicts of them from the weights alone.

SINDER linearises each block as a token alone in its image would pass it, and takes the leading left singular vector of
the product of the blocks. Here this direction is compared with the one on photographs: the mean of outlier tokens minus
that of the others, after the block where they stand out most. And the rule by which SINDER's code finds defective
tokens is applied to the same photographs. C width.

    python -m benchmarks.sinder_direction --images DIR vit_tiny_patch16_224=vit.safetensors --json OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from phreg_deploy.artifacts.outliers import NormBand, clearest_block
from phreg_deploy.distill.singular.directions import defect_directions
from phreg_deploy.distill.singular.neighbours import LEAST, cosines_with, find_defective
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models import hooks
from phreg_deploy.models.batches import Batches, spread
from phreg_deploy.models.loading import load_model, model_preprocess

# Photographs that the direction is measured on.
IMAGES = 96


def read_streams(model: hooks.ViT, batches: Batches) -> list[torch.Tensor]:
    """Return the patch tokens after each block, ``(B, N, C)``."""
    streams: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    prefix = model.num_prefix_tokens
    with hooks.block_outputs(model, lambda i, out: streams[i].append(out[:, prefix:])):
        for images in batches:
            hooks.forward(model, images)
    return [torch.cat(parts) for parts in streams]


def observed(streams: list[torch.Tensor]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return the clearest block, the direction of its outlier tokens ``(C,)``, and their mask ``(B, N)``."""
    block = clearest_block([stream.norm(dim=-1).numpy() for stream in streams])
    tokens, norms = streams[block], streams[block].norm(dim=-1).numpy()
    outside = torch.from_numpy(NormBand.of(norms).outside(norms))
    direction = tokens[outside].mean(0) - tokens[~outside].mean(0)
    return block, direction / direction.norm(), outside


def flagged(streams: list[torch.Tensor], grid: tuple[int, int], directions: torch.Tensor, border: bool) -> float:
    """Return the share of photographs in which the rule finds enough defective tokens after some block.

    Args:
        border: let tokens at the border of the image count too.
    """
    found = torch.zeros(len(streams[0]), dtype=torch.bool)
    for stream, direction in zip(streams, directions):
        defective = find_defective(cosines_with(stream.reshape(len(stream), *grid, -1), direction))
        counted = defective if border else defective[:, 1:-1, 1:-1]
        found |= counted.sum((1, 2)) >= LEAST
    return float(found.float().mean())


@torch.inference_mode()
def compare(name: str, checkpoint: Path | None, images: Path) -> dict[str, object]:
    """Return the absolute cosines between prediction and observation; two random directions have 0.8 / sqrt(C)."""
    model = load_model(name, checkpoint=checkpoint)
    preprocess, grid = model_preprocess(model, "center"), tuple(model.patch_embed.grid_size)
    photographs = spread(read_photographs(images, tuple(model.patch_embed.img_size), preprocess), IMAGES)
    streams = read_streams(model, Batches(photographs, preprocess))
    block, direction, outside = observed(streams)
    predicted = {
        "attention and MLP": defect_directions(model),
        "attention": defect_directions(model, mlps=False),
        "both, centred": defect_directions(model, centred=True),
    }
    inside = outside.reshape(-1, *grid)[:, 1:-1, 1:-1]
    return {
        "model": name,
        "block": block,
        "outliers": float(outside.float().mean()),
        "outliers_at_border": 1 - float(inside.sum() / outside.sum()),
        "images": len(photographs),
        "cosine": {kind: abs(float(directions[block] @ direction)) for kind, directions in predicted.items()},
        "random": float(np.sqrt(2 / np.pi / model.embed_dim)),
        "flagged": {
            "as released": flagged(streams, grid, predicted["both, centred"], border=False),
            "in the recipe": flagged(streams, grid, predicted["attention and MLP"], border=True),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME[=CHECKPOINT]")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for text in args.models:
        name, _, checkpoint = text.partition("=")
        rows.append(compare(name, Path(checkpoint) if checkpoint else None, args.images))
        print(json.dumps(rows[-1]), flush=True)  # noqa: T201
    args.json.write_text(json.dumps({"models": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
