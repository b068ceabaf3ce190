"""Run a PyTorch model: dense features in a bundle's format, features of photographs, and token norms per block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch

from phreg_deploy.artifacts.measures import OUTLIER_FACTOR
from phreg_deploy.artifacts.scores import Run
from phreg_deploy.images.photographs import Photographs
from phreg_deploy.layers import Layers
from phreg_deploy.models import hooks
from phreg_deploy.models.batches import Batches
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import classifies
from phreg_deploy.models.readouts import readout_of
from phreg_deploy.spec import Preprocess


def model_answers(
    model: ViT,
    preprocess: Preprocess,
    device: str = "cpu",
    *,
    layers: Layers | None = None,
    attention: bool = False,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return a function from uint8 images ``(B, H, W, 3)`` to a bundle's outputs, float32.

    ``features`` ``(B, Hp, Wp, C)``, ``token_norm`` ``(B, Hp, Wp)``; with a class token, ``cls`` ``(B, C)``; the same of
    each of ``layers``, named ``features.3`` and so on; with ``attention``, ``attention`` ``(B, heads, Hp, Wp)``.
    """
    model = model.to(device).eval()
    grid, prefix, class_token = tuple(model.patch_embed.grid_size), model.num_prefix_tokens, model.cls_token is not None
    blocks = () if layers is None else layers.blocks

    def name(tokens: torch.Tensor, norms: torch.Tensor) -> dict[str, np.ndarray]:
        """Return the outputs of one layer, of ``tokens`` ``(B, T, C)`` and the norms ``(B, N)`` of its patches."""
        outputs = {
            "features": tokens[:, prefix:].cpu().numpy().reshape(len(tokens), *grid, -1),
            "token_norm": norms.cpu().numpy().reshape(len(tokens), *grid),
        }
        return {**outputs, "cls": tokens[:, 0].cpu().numpy()} if class_token else outputs

    @torch.inference_mode()
    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        batch = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        streams: dict[int, torch.Tensor] = {}
        rows: list[torch.Tensor] = []
        with ExitStack() as stack:
            if blocks:
                stack.enter_context(hooks.block_outputs(model, lambda i, out: streams.update({i + 1: out})))
            if attention:
                stack.enter_context(hooks.class_attention(model, rows.append))
            features = hooks.forward(model, hooks.normalise(batch, preprocess.mean, preprocess.std))
        outputs = name(features.tokens, features.norms)
        for block in blocks:
            stream = streams[block]
            tokens = hooks.final_norm(model)(stream) if layers is not None and layers.norm else stream
            of_layer = name(tokens, stream[:, prefix:].float().norm(dim=-1))
            outputs.update({f"{kind}.{block}": value for kind, value in of_layer.items()})
        if attention:
            outputs["attention"] = rows[0][..., prefix:].float().cpu().numpy().reshape(len(images), -1, *grid)
        return outputs

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
        # The head reads the plain final tokens.
        if classifies(model) and readout_of(model).is_plain:
            parts["logits"].append(model.forward_head(features.head_input).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items() if part}


def block_norms(
    model: ViT, photographs: Photographs, preprocess: Preprocess, device: str = "cpu"
) -> list[dict[str, float]]:
    """Measure norms of patch tokens after each block: ``median``, ``largest`` in medians, ``rate`` above 2 medians."""
    statistics = []
    for values in norms_by_block(model, photographs, preprocess, device):
        median = float(np.median(values))
        statistics.append(
            {
                "median": median,
                "largest": float(values.max() / median),
                "rate": float(np.mean(values > OUTLIER_FACTOR * median)),
            }
        )
    return statistics


@torch.inference_mode()
def norms_by_block(
    model: ViT, photographs: Photographs, preprocess: Preprocess, device: str = "cpu"
) -> list[np.ndarray]:
    """Return the L2 norms of the patch tokens after each block, float32 ``(M, N)`` for M photographs."""
    model = model.to(device).eval()
    norms: list[list[np.ndarray]] = [[] for _ in model.blocks]
    prefix = model.num_prefix_tokens
    with hooks.block_outputs(model, lambda i, out: norms[i].append(out[:, prefix:].float().norm(dim=-1).cpu().numpy())):
        for images in Batches(photographs, preprocess, device):
            hooks.forward(model, images)
    return [np.concatenate(block) for block in norms]
