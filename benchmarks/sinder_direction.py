"""Compare the direction of outlier tokens with what SINDER (arXiv 2407.16826) predicts from the weights alone.

SINDER linearises each block as a token alone in its image would pass it, and takes the leading left singular vector of
the product of the blocks. Here this direction is compared with the one on photographs: the mean of outlier tokens minus
that of the others, after the block where they stand out most. C width.

    python -m benchmarks.sinder_direction --images DIR vit_tiny_patch16_224=vit.safetensors --json OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from phreg_deploy.artifacts.outliers import NormBand, clearest_block
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.models import hooks
from phreg_deploy.models.batches import Batches, spread
from phreg_deploy.models.loading import load_model, model_preprocess

# Photographs that the direction is measured on.
IMAGES = 96
# Random inputs of the least-squares fit of an MLP; SINDER's code takes 100,000.
SAMPLES = 20_000


def predicted(model: hooks.ViT, blocks: int, fitted: bool) -> torch.Tensor:
    """Return the leading left singular vector ``(C,)`` of the first ``blocks`` blocks' product.

    Args:
        fitted: linearise the activations of MLPs by least squares on random inputs; else leave the MLPs out.
    """
    width = model.embed_dim
    product = torch.eye(width, dtype=torch.float64)
    for block in model.blocks[:blocks]:
        values = block.attn.qkv.weight.double()[2 * width :]
        attention = block.attn.proj.weight.double() @ values @ torch.diag(block.norm1.weight.double())
        layer = torch.eye(width, dtype=torch.float64) + attention
        if fitted:
            inputs = torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(0))
            hidden = block.mlp.act(block.mlp.fc1(inputs))
            linear = torch.linalg.lstsq(inputs, hidden).solution.double()
            mlp = block.mlp.fc2.weight.double() @ linear.T @ torch.diag(block.norm2.weight.double())
            layer = (torch.eye(width, dtype=torch.float64) + mlp) @ layer
        product = layer @ product
        product = product / product.norm()
    return torch.linalg.svd(product)[0][:, 0]


def observed(model: hooks.ViT, batches: Batches) -> tuple[int, torch.Tensor, float]:
    """Return the clearest block, the direction of its outlier tokens ``(C,)``, and their share."""
    streams: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(model.blocks))}
    prefix = model.num_prefix_tokens
    with hooks.block_outputs(model, lambda i, out: streams[i].append(out[:, prefix:])):
        for images in batches:
            hooks.forward(model, images)
    tokens = {i: torch.cat(parts).flatten(0, 1) for i, parts in streams.items()}
    block = clearest_block([tokens[i].norm(dim=-1).numpy() for i in tokens])
    norms = tokens[block].norm(dim=-1).numpy()
    outside = torch.from_numpy(NormBand.of(norms).outside(norms))
    direction = tokens[block][outside].mean(0) - tokens[block][~outside].mean(0)
    return block, direction.double() / direction.double().norm(), float(outside.float().mean())


@torch.inference_mode()
def compare(name: str, checkpoint: Path | None, images: Path) -> dict[str, object]:
    """Return the absolute cosines between prediction and observation; two random directions have 0.8 / sqrt(C)."""
    model = load_model(name, checkpoint=checkpoint)
    if any(not isinstance(getattr(block, "ls1", None), (nn.Identity, type(None))) for block in model.blocks):
        raise SystemExit(f"{name} has LayerScale, which this script leaves out.")
    preprocess = model_preprocess(model, "center")
    photographs = spread(read_photographs(images, tuple(model.patch_embed.img_size), preprocess), IMAGES)
    block, direction, rate = observed(model, Batches(photographs, preprocess))
    cosines = {
        kind: abs(float(predicted(model, block + 1, fitted) @ direction))
        for kind, fitted in (("attention and MLP", True), ("attention", False))
    }
    return {
        "model": name,
        "block": block,
        "outliers": rate,
        "images": len(photographs),
        "cosine": cosines,
        "random": float(np.sqrt(2 / np.pi / model.embed_dim)),
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
