"""Run a PyTorch model: dense features in a bundle's format, features of photographs, and token norms per block."""

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
    """Return a function from uint8 images ``(B, H, W, 3)`` to a bundle's outputs, float32.

    ``features`` ``(B, Hp, Wp, C)``, ``token_norm`` ``(B, Hp, Wp)``; with a class token, ``cls`` ``(B, C)``.
    """
    model = model.to(device).eval()
    grid = tuple(model.patch_embed.grid_size)

    @torch.inference_mode()
    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        batch = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        features = hooks.forward(model, hooks.normalise(batch, preprocess.mean, preprocess.std))
        outputs = {
            "features": features.patches.cpu().numpy().reshape(len(images), *grid, -1),
            "token_norm": features.norms.cpu().numpy().reshape(len(images), *grid),
        }
        return outputs if features.cls is None else {**outputs, "cls": features.cls.cpu().numpy()}

    return answer


def model_run(model: ViT, preprocess: Preprocess, device: str = "cpu") -> Run:
    """Return a function from uint8 images to float32 features and norms, as ``artifacts.scores.score`` calls it."""
    answer = model_answers(model, preprocess, device)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs = answer(images)
        return outputs["features"], outputs["token_norm"]

    return run


@torch.inference_mode()
def read_features(
    model: ViT, photographs: Photographs, preprocess: Preprocess, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Compute ``patches`` ``(M, N, C)``, ``norms`` ``(M, N)``; ``cls`` ``(M, C)`` and ``logits`` if there are any."""
    model = model.to(device).eval()
    parts: dict[str, list[np.ndarray]] = {"patches": [], "norms": [], "cls": [], "logits": []}
    for images in Batches(photographs, preprocess, device):
        features = hooks.forward(model, images)
        parts["patches"].append(features.patches.cpu().numpy())
        parts["norms"].append(features.norms.cpu().numpy())
        if features.cls is not None:
            parts["cls"].append(features.cls.cpu().numpy())
        if classifies(model):
            parts["logits"].append(model.forward_head(features.head_input).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items() if part}


@torch.inference_mode()
def block_norms(
    model: ViT, photographs: Photographs, preprocess: Preprocess, device: str = "cpu"
) -> list[dict[str, float]]:
    """Measure norms of patch tokens after each block: ``median``, ``largest`` in medians, ``rate`` above 2 medians."""
    model = model.to(device).eval()
    norms: list[list[np.ndarray]] = [[] for _ in model.blocks]
    prefix = model.num_prefix_tokens
    with hooks.block_outputs(model, lambda i, out: norms[i].append(out[:, prefix:].float().norm(dim=-1).cpu().numpy())):
        for images in Batches(photographs, preprocess, device):
            hooks.forward(model, images)
    statistics = []
    for block in norms:
        values = np.concatenate(block)
        median = float(np.median(values))
        statistics.append(
            {
                "median": median,
                "largest": float(values.max() / median),
                "rate": float(np.mean(values > OUTLIER_FACTOR * median)),
            }
        )
    return statistics
