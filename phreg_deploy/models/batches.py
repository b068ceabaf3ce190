"""Photographs as a model takes them, a few at a time, without holding all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from phreg_deploy.images.photographs import Photographs
from phreg_deploy.models import hooks
from phreg_deploy.spec import Preprocess

STEP = 16


@dataclass
class Batches:
    """Normalised images ``(B, 3, H, W)`` on a device; made anew in each iteration."""

    photographs: Photographs
    preprocess: Preprocess
    device: str = "cpu"

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.photographs), STEP):
            images = torch.from_numpy(self.photographs.batch(start, start + STEP)).to(self.device)
            yield hooks.normalise(images, self.preprocess.mean, self.preprocess.std)


def spread(photographs: Photographs, most: int) -> Photographs:
    """At most ``most`` evenly spaced images: neighbours by name are often alike, and figures must hold for all."""
    count = min(most, len(photographs))
    return photographs.subset(i * len(photographs) // count for i in range(count))
