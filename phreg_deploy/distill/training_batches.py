"""Read batches of images and targets from the cache ahead of training. B batch, N patch tokens, C width."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from phreg_deploy.distill.devices.processes import ALONE, Processes
from phreg_deploy.distill.objective import MicroBatch
from phreg_deploy.distill.recipes import Recipe
from phreg_deploy.distill.teacher import TargetCache

# Batches per thread that are read ahead.
AHEAD = 2
# Most threads that read by default; `python -m benchmarks.distill_size` measures what they bring.
MOST_WORKERS = 4


@dataclass
class Batch:
    """This process's images of a batch, uint8 ``(B, H, W, 3)``, and their targets as they are cached.

    ``patches`` ``(B, N, C)``, ``cls`` ``(B, C)`` or None and ``layers`` ``(B, L, N, C)`` or None are float16, ``drift``
    ``(B, N)`` is float32. ``whole``: images of the batch in all processes.
    """

    images: torch.Tensor
    patches: torch.Tensor
    cls: torch.Tensor | None
    drift: torch.Tensor
    whole: int
    layers: torch.Tensor | None = None

    def pinned(self) -> Batch:
        """Copy to page-locked memory, from which a GPU copies while the host goes on."""
        cls = None if self.cls is None else self.cls.pin_memory()
        layers = None if self.layers is None else self.layers.pin_memory()
        images, patches, drift = (x.pin_memory() for x in (self.images, self.patches, self.drift))
        return Batch(images, patches, cls, drift, self.whole, layers)


def read_batches(
    cache: TargetCache,
    digests: list[str],
    recipe: Recipe,
    seed: int,
    epoch: int,
    *,
    workers: int | None = None,
    pin: bool = False,
    processes: Processes = ALONE,
) -> Iterator[Batch]:
    """Read one epoch in its own order, in threads that read ahead.

    Args:
        workers: threads; None for one per core that this process may use, at most ``MOST_WORKERS``.
        pin: read into page-locked memory.
        processes: each takes an equal part of every batch, which may be no image of a small one.
    """
    workers = workers or min(MOST_WORKERS, usable_cores())
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(digests))
    parts = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
    flips = [rng.random(len(part)) < 0.5 if recipe.flips else np.zeros(len(part), bool) for part in parts]
    own = slice(processes.rank, None, processes.count)

    def load(part: np.ndarray, flip: np.ndarray) -> Batch:
        batch = load_batch(cache, [digests[i] for i in part[own]], flip[own], len(part))
        return batch.pinned() if pin else batch

    pending: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for part, flip in zip(parts, flips):
            pending.append(pool.submit(load, part, flip))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_batch(cache: TargetCache, digests: list[str], flips: np.ndarray, whole: int | None = None) -> Batch:
    """Read the targets of some images; those with a true value in ``flips`` ``(B,)`` are mirrored.

    ``whole``: images of the batch in all processes; None if these are all.
    """
    if not digests:
        nothing = torch.zeros(0, 0)
        return Batch(nothing, nothing, None, nothing, whole or 0)
    items = [cache.read(digest) for digest in digests]
    grid = cache.teacher.grid
    for item, flip in zip(items, flips):
        item["drift"] = item["drift"].astype(np.float32)
        for name in ("patches", "drift"):
            item[name] = item[name].reshape(*grid, -1)
        if item["cls"].size:
            item["cls"] = item["cls"][int(flip)]
        if flip:
            for name in ("image", "patches", "drift"):
                item[name] = item[name][:, ::-1]
        if "layers" in item:
            maps = item["layers"].reshape(len(item["layers"]), *grid, -1)
            item["layers"] = (maps[:, :, ::-1] if flip else maps).reshape(item["layers"].shape)
    images, patches, cls, drift = (
        torch.from_numpy(np.stack([item[name] for item in items])) for name in ("image", "patches", "cls", "drift")
    )
    cls_or_none = cls if cls.numel() else None
    layers = torch.from_numpy(np.stack([item["layers"] for item in items])) if "layers" in items[0] else None
    return Batch(images, patches.flatten(1, 2), cls_or_none, drift.flatten(1), whole or len(digests), layers)


def split_batch(
    batch: Batch, recipe: Recipe, micro_batch: int | None, devices: int, processes: Processes = ALONE
) -> list[MicroBatch]:
    """Split a batch into parts of at most ``micro_batch`` images, with one for every device if it has the images.

    The losses and gradients of the parts of all processes add up to those of the whole batch: patch weights are
    normalised over the whole batch, and each part counts by its share of the images.
    """
    count = len(batch.images)
    size = max(1, min(micro_batch or count, math.ceil(count / devices)))
    weight = 1 + recipe.hard_weight * batch.drift
    if processes.count == 1:
        weight = weight / weight.mean()
    else:
        total, tokens = processes.sum([weight.sum(dtype=torch.float64).item(), weight.numel()])
        weight = weight / (total / tokens)
    parts = []
    for start in range(0, count, size):
        rows = slice(start, start + size)
        images, cls = batch.images[rows], None if batch.cls is None else batch.cls[rows]
        layers = None if batch.layers is None else batch.layers[rows]
        parts.append(MicroBatch(images, batch.patches[rows], cls, weight[rows], len(images) / batch.whole, layers))
    return parts
