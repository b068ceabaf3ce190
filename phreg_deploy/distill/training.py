"""The distillation loop: loss, schedule, resume. Knows neither files of images nor where the student goes.

B batch, N patch tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from phreg_deploy.distill.fake_quantisation import observe, quantised
from phreg_deploy.distill.recipes import Recipe, unlocked
from phreg_deploy.distill.replicas import Replicas
from phreg_deploy.distill.teacher import TargetCache, precision
from phreg_deploy.errors import PhregError, write_error
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT
from phreg_deploy.progress import Progress
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.spec import Preprocess


@dataclass
class Batch:
    """``images`` uint8 ``(B, H, W, 3)``, ``patches`` ``(B, N, C)``, ``cls`` ``(B, C)`` or None, ``drift`` ``(B, N)``."""

    images: torch.Tensor
    patches: torch.Tensor
    cls: torch.Tensor | None
    drift: torch.Tensor


@dataclass
class Part:
    """The images of a batch that one forward and backward pass takes.

    As in ``Batch``, but ``weight`` ``(B, N)`` of each patch token, which has a mean of 1 over the whole batch; ``share``
    of the batch's images that are in this part.
    """

    images: torch.Tensor
    patches: torch.Tensor
    cls: torch.Tensor | None
    weight: torch.Tensor
    share: float


@dataclass
class Scale:
    """Variances of the targets: what squared errors are measured in."""

    patches: float = 1.0
    cls: float = 1.0


def train(
    student: ViT, cache: TargetCache, digests: list[str], preprocess: Preprocess, recipe: Recipe, *,
    seed: int, devices: Sequence[str], autocast: bool, work: Path, resume: bool, progress: Progress,
    ranges_on: Iterable[torch.Tensor] = (), micro_batch: int | None = None, grad_checkpointing: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Distil ``student`` in place against cached targets; the state after every epoch is kept in ``work``.

    Args:
        digests: of the training images, all in the cache.
        work: a folder of this run's own; ``state.pt`` in it is what ``resume`` goes on from. Each epoch's order
            depends on the seed and its number only, so that a resumed run gives the same student.
        ranges_on: normalised images ``(B, 3, H, W)`` that the grids of fake quantisation are observed on, anew before
            each epoch.
        devices: the first holds ``student`` and ``ranges_on``; each other one a copy, to which parts of every batch go.
        micro_batch: most images per forward and backward pass; by default a batch, or a device's share of it.
        grad_checkpointing: recompute each block in the backward pass instead of keeping its activations (arXiv 1604.06174).
            None of the last three changes the student, except by rounding.

    Returns:
        The history: mean loss per epoch.

    Raises:
        PhregError: a loss that is not finite; ``work`` then still holds the last good epoch.
    """
    student.to(devices[0])
    free = unlocked(student, recipe.unlock)
    groups = [
        {"params": [p for p in free if p.ndim > 1 or recipe.decays_vectors], "weight_decay": recipe.weight_decay},
        {"params": [p for p in free if p.ndim <= 1 and not recipe.decays_vectors], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999))
    steps = max(1, math.ceil(len(digests) / recipe.batch))
    history: list[float] = []
    state = work / "state.pt"
    if resume and state.is_file():
        try:
            kept = torch.load(state, map_location=devices[0], weights_only=True)
        except Exception as error:  # torch raises pickle, zip, EOF and runtime errors for damaged files
            raise PhregError(
                f"resume: {state} is damaged ({type(error).__name__}); add --force instead of --resume to start over."
            ) from None
        student.load_state_dict(kept["student"])
        optimizer.load_state_dict(kept["optimizer"])
        history = kept["history"]
    scale = target_scale(cache, digests) if recipe.scale_free else Scale()
    student.train()
    student.set_grad_checkpointing(grad_checkpointing)
    replicas = Replicas(student, devices)

    def learn(model: ViT, device: str, part: Part) -> float:
        """Add the gradient of a part's loss to ``model``, and return that loss."""
        with precision(device, autocast):
            seen = hooks.forward(model, hooks.normalise(part.images.to(device), preprocess.mean, preprocess.std))
        loss = objective(seen, part, recipe, scale, device)
        loss.backward()
        return loss.item()

    with progress.task("distilling", recipe.epochs * len(digests)) as advance:
        advance(len(history) * len(digests))
        for epoch in range(len(history), recipe.epochs):
            losses = []
            grids = observe(student, ranges_on, Smoothing()) if recipe.int8 else {}
            for step, batch in enumerate(_batches(cache, digests, recipe, seed, epoch)):
                for group in optimizer.param_groups:
                    group["lr"] = rate(recipe, (epoch * steps + step) / (recipe.epochs * steps))
                optimizer.zero_grad(set_to_none=True)
                with ExitStack() as stack:  # open in the backward pass too, which may compute blocks again
                    for model in replicas.models:
                        stack.enter_context(quantised(model, grids))
                    loss = sum(replicas.spread(learn, divide(batch, recipe, micro_batch, len(devices))))
                if not math.isfinite(loss):
                    raise PhregError(
                        f"distill: the loss became {loss} in epoch {epoch + 1}, step {step + 1}. The state after epoch {epoch} is kept in "
                        f"{work}; try a smaller --lr, or --precision fp32."
                    )
                replicas.sum_gradients()
                if recipe.clip:
                    nn.utils.clip_grad_norm_(free, recipe.clip)
                optimizer.step()
                replicas.share_weights()
                losses.append(loss)
                advance(len(batch.images), note=f"loss {np.mean(losses[-20:]):.4f}")
            history.append(float(np.mean(losses)))
            _keep(state, {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "history": history})
    student.eval().cpu()
    student.set_grad_checkpointing(False)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    return {"loss": history, "steps_per_epoch": steps}


def divide(batch: Batch, recipe: Recipe, micro_batch: int | None, devices: int) -> list[Part]:
    """A batch in parts of at most ``micro_batch`` images, at least as many as there are devices where it has the images.

    The losses of the parts add up to that of the whole batch, and so do their gradients: patch weights are normalised
    over the whole batch, and each part counts by its share of the images.
    """
    count = len(batch.images)
    size = min(micro_batch or count, math.ceil(count / devices))
    weight = 1 + recipe.hard_weight * batch.drift
    weight = weight / weight.mean()
    return [
        Part(
            batch.images[start : start + size],
            batch.patches[start : start + size],
            None if batch.cls is None else batch.cls[start : start + size],
            weight[start : start + size],
            min(size, count - start) / count,
        )
        for start in range(0, count, size)
    ]


def objective(seen: hooks.Features, part: Part, recipe: Recipe, scale: Scale, device: str) -> torch.Tensor:
    """What a part adds to its batch's loss, with ``seen`` the student's features of it.

    (1 - cos) + MSE on patch tokens (arXiv 2505.21501 section 3.2), and the same on the class token where asked.
    """
    loss = _distance(seen.patches.float(), part.patches.to(device), part.weight.to(device), scale.patches)
    if recipe.class_weight and seen.cls is not None and part.cls is not None:
        one = torch.ones(len(part.images), device=device)
        loss = loss + recipe.class_weight * _distance(seen.cls.float(), part.cls.to(device), one, scale.cls)
    return loss * part.share


def rate(recipe: Recipe, done: float) -> float:
    """The learning rate when ``done`` (0-1) of all steps are made."""
    if recipe.lr_end is not None:
        return float(recipe.lr * (recipe.lr_end / recipe.lr) ** done)
    warm = 0.1
    if done < warm:
        return recipe.lr * (0.04 + 0.96 * done / warm)
    return recipe.lr * max(1e-4, 0.5 + 0.5 * math.cos(math.pi * (done - warm) / (1 - warm)))


def target_scale(cache: TargetCache, digests: list[str], most: int = 64) -> Scale:
    """Variance over images and positions, averaged over channels, of a sample of the targets."""
    items = [cache.read(d) for d in digests[:: max(1, len(digests) // most)]]
    patches = np.concatenate([item["patches"].astype(np.float32) for item in items])
    cls = np.stack([item["cls"].astype(np.float32) for item in items])
    return Scale(float(patches.var(0).mean()) or 1.0, (float(cls.var(0).mean()) or 1.0) if cls.size else 1.0)


def _distance(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, variance: float) -> torch.Tensor:
    cosine = 1 - F.cosine_similarity(x, target, dim=-1)
    return (weight * cosine).mean() + (weight * (x - target).square().mean(-1)).mean() / variance


def _batches(cache: TargetCache, digests: list[str], recipe: Recipe, seed: int, epoch: int) -> Iterator[Batch]:
    """One epoch in its own order, the next batches read ahead by two threads."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(digests))
    parts = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
    flips = [rng.random(len(part)) < 0.5 if recipe.flips else np.zeros(len(part), bool) for part in parts]
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(_load, cache, [digests[i] for i in part], flip) for part, flip in zip(parts[:4], flips[:4])
        ]
        for ahead in range(4, len(parts) + 4):
            ready = waiting.pop(0).result() if waiting else None
            if ahead < len(parts):
                waiting.append(pool.submit(_load, cache, [digests[i] for i in parts[ahead]], flips[ahead]))
            if ready is not None:
                yield ready


def _load(cache: TargetCache, digests: list[str], flips: np.ndarray) -> Batch:
    items = [cache.read(digest) for digest in digests]
    grid = cache.teacher.grid
    for item, flip in zip(items, flips):
        for name in ("patches", "drift"):
            item[name] = item[name].astype(np.float32).reshape(*grid, -1)
        if item["cls"].size:
            item["cls"] = item["cls"][int(flip)]
        if flip:
            for name in ("image", "patches", "drift"):
                item[name] = item[name][:, ::-1]
    patches = torch.from_numpy(np.stack([item["patches"] for item in items])).flatten(1, 2)
    drift = torch.from_numpy(np.stack([item["drift"] for item in items])).flatten(1)
    cls = (
        torch.from_numpy(np.stack([item["cls"] for item in items]).astype(np.float32)) if items[0]["cls"].size else None
    )
    return Batch(torch.from_numpy(np.stack([item["image"] for item in items])), patches, cls, drift)


def _keep(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".writing")
    try:
        torch.save(state, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        raise write_error(error if isinstance(error, OSError) else OSError(28, str(error)), path) from error
