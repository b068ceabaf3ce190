"""Which photographs do what: ranges, choices and the report share no image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.runtime.features import FeatureExtractor

RANGED, CHOSEN, REPORTED = 65536, 8192, 16384  # patches that are enough: larger inputs need fewer images
CALIBRATE, SELECT, REPORT = (64, 256), (8, 32), (16, 64)  # images, whatever their size: at least, at most
LEAST = 8  # images in all


@dataclass(frozen=True)
class Shares:
    """Disjoint sets of images, by the sha256 of their files."""

    calibrate: Photographs
    select: Photographs
    report: Photographs
    tokens: int  # per image

    def to_json(self) -> dict[str, Any]:
        parts = {"calibrate": self.calibrate, "select": self.select, "report": self.report}
        return {
            name: {"count": len(part), "digest": part.digest(), "sha256": part.digests} for name, part in parts.items()
        }


def split_images(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> Shares:
    """Up to 256 images for ranges, 32 for choices and 64 for the report; of few images, a quarter for each of the latter.

    Which image goes where is decided by its digest alone, and copies of one image count once.

    Raises:
        PhregError: fewer than 8 different images.
    """
    size, patch = manifest.sizes.default, manifest.model.patch
    grid = (size[0] // patch[0]) * (size[1] // patch[1])
    ranged, chosen, reported = (
        min(most, max(least, patches // grid))
        for patches, (least, most) in ((RANGED, CALIBRATE), (CHOSEN, SELECT), (REPORTED, REPORT))
    )
    found = read_photographs(folder, size, manifest.preprocess, ranged + chosen + reported, say=say, spread=True)
    first = {digest: i for i, digest in reversed(list(enumerate(found.digests)))}
    order = [first[digest] for digest in sorted(first)]
    if len(order) < LEAST:
        raise PhregError(
            f"images: {folder} holds {len(order)} different images that can be read, expected at least {LEAST}: they are shared out "
            "between ranges, choices and the report."
        )
    quarter = len(order) // 4
    ends = (-min(chosen, quarter) - min(reported, quarter), -min(reported, quarter))
    return Shares(
        found.subset(order[: ends[0]]),
        found.subset(order[ends[0] : ends[1]]),
        found.subset(order[ends[1] :]),
        grid + manifest.model.prefix_tokens,
    )


def feeds(extractor: FeatureExtractor, photographs: Photographs) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """The graph's inputs, as many images at a time as the bundle serves best, and how many of them count.

    Where a last batch is smaller than the bundle serves, it is filled up with its own last image.
    """
    lowest, best = extractor.manifest.batches.lowest, extractor.manifest.batches.best
    for start in range(0, len(photographs), best):
        batch = photographs.batch(start, start + best)
        count = len(batch)
        if count < lowest:
            batch = np.concatenate([batch, np.repeat(batch[-1:], lowest - count, axis=0)])
        yield extractor.feed(np.ascontiguousarray(batch)), count
