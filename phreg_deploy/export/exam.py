"""Make a bundle's exam: seeded images, and the answers of the PyTorch model to them."""

from __future__ import annotations

import copy

import numpy as np
import torch

from phreg_deploy.layers import Layers
from phreg_deploy.models.answers import model_answers
from phreg_deploy.models.hooks import ViT
from phreg_deploy.spec import Batches, Preprocess, Sizes

SEED = 417
# Cells per side and strength, in grey levels, of the random fields that an image is the sum of.
FIELDS = ((3, 70), (9, 40), (31, 25), (113, 12))


@torch.inference_mode()
def make_exam(
    model: ViT,
    preprocess: Preprocess,
    sizes: Sizes,
    batches: Batches,
    layers: Layers | None = None,
    attention: bool = False,
) -> dict[str, np.ndarray]:
    """Compute what the unchanged PyTorch model answers, in float32, to seeded images of every listed size.

    Returns:
        ``{case}/image`` uint8 ``(B, H, W, 3)``, and every output of ``models.answers.model_answers``, such as
        ``{case}/features`` ``(B, Hp, Wp, C)``.
    """
    rng, exam = np.random.default_rng(SEED), {}
    batch = min(2, batches.highest) if batches.dynamic else batches.best
    for case, size in enumerate(dict.fromkeys(sizes.sizes)):
        sized = at_size(model, size)
        images = np.stack([_make_image(rng, size) for _ in range(batch)])
        answers = model_answers(sized, preprocess, layers=layers, attention=attention)(images)
        exam[f"{case}/image"] = images
        exam.update({f"{case}/{name}": value for name, value in answers.items()})
    return exam


def at_size(model: ViT, size: tuple[int, int]) -> ViT:
    """Return the model at another input size (height, width); the original keeps its own position embedding.

    The two share every other weight: DINOv2-g would not fit into memory several times.
    """
    if tuple(model.patch_embed.img_size) == size:
        return model
    shared = {id(value): value for name, value in model.named_parameters() if name != "pos_embed"}
    sized = copy.deepcopy(model, shared)
    sized.set_input_size(img_size=size)
    return sized.eval()


def _make_image(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Add coarse and fine random fields, for an image between noise and a photograph: uint8 ``(H, W, 3)``."""
    total = np.zeros((*size, 3))
    for cells, strength in FIELDS:
        coarse = rng.standard_normal((cells, cells, 3))
        rows = np.linspace(0, cells - 1, size[0]).astype(int)
        columns = np.linspace(0, cells - 1, size[1]).astype(int)
        total += strength * coarse[rows][:, columns]
    return np.clip(total + 120, 0, 255).astype(np.uint8)
