"""Small models with rotary embeddings, their bundles for a range of sizes, and what PyTorch answers."""

from pathlib import Path

import numpy as np
import torch

from phreg_deploy.export import export
from phreg_deploy.export.exam import at_size
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import model_preprocess
from tests.small_models import save, small

# (rows, columns) of patches, none square.
GRIDS = [(2, 3), (5, 4), (3, 8), (9, 2), (7, 6)]


def make(family: str, folder: Path):
    model = small(family)
    patch = model.patch_embed.patch_size[0]
    sizes = f"{2 * patch}:{4 * patch}:{9 * patch}"
    export(str(save(model, folder / "model")), folder / "bundle", image_size=sizes, batch="1:2:4")
    return model, folder / "bundle"


def pictures(model, grid, count=2):
    rows, columns = (side * step for side, step in zip(grid, model.patch_embed.patch_size))
    return np.random.default_rng(grid[0]).integers(0, 256, (count, rows, columns, 3), dtype=np.uint8)


def expected(model, images):
    preprocess = model_preprocess(model)
    with torch.no_grad():
        sized = at_size(model, tuple(images.shape[1:3]))
        return hooks.forward(sized, hooks.normalise(images, preprocess.mean, preprocess.std))
