"""What a PyTorch model answers: dense features as a bundle gives them, and token norms block by block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from phreg_deploy.artifacts.measures import OUTLIER_FACTOR
from phreg_deploy.artifacts.scores import Run
from phreg_deploy.images.photographs import Photographs
from phreg_deploy.models import hooks
from phreg_deploy.models.batches import Batches
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import classifies
from phreg_deploy.spec import Preprocess


def model_answers(
    model: ViT, preprocess: Preprocess, device: str = "cpu"
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The model as a bundle answers: uint8 images in, float32 ``features``, ``token_norm`` and, where there is one, ``cls``."""
    model = model.to(device).eval()
    grid = tuple(model.patch_embed.grid_size)

    @torch.inference_mode()
    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        batch = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        seen = hooks.forward(model, hooks.normalise(batch, preprocess.mean, preprocess.std))
        found = {"features": seen.patches.cpu().numpy().reshape(len(images), *grid, -1)}
        found["token_norm"] = seen.norms.cpu().numpy().reshape(len(images), *grid)
        return found if seen.cls is None else {**found, "cls": seen.cls.cpu().numpy()}

    return answer


def model_run(model: ViT, preprocess: Preprocess, device: str = "cpu") -> Run:
    """The model as ``scores.score`` calls it: uint8 images in, float32 features and norms out."""
    answer = model_answers(model, preprocess, device)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = answer(images)
        return found["features"], found["token_norm"]

    return run


@torch.inference_mode()
def read_features(
    model: ViT, photographs: Photographs, preprocess: Preprocess, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Of every photograph: ``patches`` ``(M, N, C)``, ``norms`` ``(M, N)``, ``cls`` ``(M, C)`` and ``logits`` where there are any."""
    model = model.to(device).eval()
    parts: dict[str, list[np.ndarray]] = {"patches": [], "norms": [], "cls": [], "logits": []}
    for images in Batches(photographs, preprocess, device):
        seen = hooks.forward(model, images)
        parts["patches"].append(seen.patches.cpu().numpy())
        parts["norms"].append(seen.norms.cpu().numpy())
        if seen.cls is not None:
            parts["cls"].append(seen.cls.cpu().numpy())
        if classifies(model):
            parts["logits"].append(model.forward_head(seen.given).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items() if part}


@torch.inference_mode()
def block_norms(
    model: ViT, photographs: Photographs, preprocess: Preprocess, device: str = "cpu"
) -> list[dict[str, float]]:
    """Per block, over patch tokens: ``median`` norm of its output, ``largest`` over that median, ``rate`` above twice it."""
    model = model.to(device).eval()
    norms: list[list[np.ndarray]] = [[] for _ in model.blocks]
    prefix = model.num_prefix_tokens
    with hooks.block_outputs(model, lambda i, out: norms[i].append(out[:, prefix:].float().norm(dim=-1).cpu().numpy())):
        for images in Batches(photographs, preprocess, device):
            hooks.forward(model, images)
    found = []
    for block in norms:
        values = np.concatenate(block)
        median = float(np.median(values))
        found.append(
            {
                "median": median,
                "largest": float(values.max() / median),
                "rate": float(np.mean(values > OUTLIER_FACTOR * median)),
            }
        )
    return found
