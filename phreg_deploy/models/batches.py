"""Choose photographs, and turn them into batches of normalised images without holding all of them in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from phreg_deploy.arguments import check_distillation
from phreg_deploy.images.photographs import Photographs
from phreg_deploy.models import hooks
from phreg_deploy.spec import Preprocess

# Images per batch.
STEP = 16
# Nothing is held out of fewer images than this.
LEAST_TO_HOLD_OUT = 20


@dataclass
class Batches:
    """Normalised images ``(B, 3, H, W)`` on a device, read anew in every iteration."""

    photographs: Photographs
    preprocess: Preprocess
    device: str = "cpu"

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.photographs), STEP):
            images = torch.from_numpy(self.photographs.batch(start, start + STEP)).to(self.device)
            yield hooks.normalise(images, self.preprocess.mean, self.preprocess.std)


def spread(photographs: Photographs, most: int) -> Photographs:
    """Return at most ``most`` evenly spaced images, since neighbours by name are often alike."""
    count = min(most, len(photographs))
    return photographs.subset(i * len(photographs) // count for i in range(count))


def split(photographs: Photographs, share: float) -> tuple[Photographs, Photographs | None]:
    """Split into training and held-out images by a hash of each name; an added image moves no other one.

    Nothing is held out of fewer than ``LEAST_TO_HOLD_OUT`` images.

    Raises:
        PhregError: ``share`` is not from 0 to below 1.
    """
    check_distillation({"holdout": share})
    hashes = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in photographs.names]
    held_out = [i for i, value in enumerate(hashes) if value < share]
    if len(photographs) < LEAST_TO_HOLD_OUT or not held_out or len(held_out) == len(photographs):
        return photographs, None
    return photographs.subset(i for i, value in enumerate(hashes) if value >= share), photographs.subset(held_out)
