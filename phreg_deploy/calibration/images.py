"""Split the photographs into those for ranges, for choices and for the report; no image is in two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.runtime.feed import InputFeed, pad_batch

# Batches of graph inputs, and how many images of each count.
Feeds = list[tuple[dict[str, np.ndarray], int]]

# Each share: the patches that are enough, and the least and most images. Larger inputs need fewer images.
CALIBRATE, SELECT, REPORT = (65536, 64, 256), (8192, 8, 32), (16384, 16, 64)
# Least number of different images in all.
LEAST = 8


@dataclass(frozen=True)
class Shares:
    """Disjoint sets of images, by the sha256 of their files; ``tokens``: per image."""

    calibrate: Photographs
    select: Photographs
    report: Photographs
    tokens: int

    def to_json(self) -> dict[str, Any]:
        names = ("calibrate", "select", "report")
        parts = {name: getattr(self, name) for name in names}
        return {n: {"count": len(part), "digest": part.digest(), "sha256": part.digests} for n, part in parts.items()}


def split_images(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> Shares:
    """Take up to 256 images for ranges, 32 for choices and 64 for the report.

    Choices and report get at most a quarter of the images each. The digest of an image alone decides its share, and
    copies of one image count once.

    Raises:
        PhregError: fewer than 8 different images.
    """
    size, patch = manifest.sizes.default, manifest.model.patch
    grid = (size[0] // patch[0]) * (size[1] // patch[1])
    bounds = (CALIBRATE, SELECT, REPORT)
    calibrate, select, report = (min(most, max(least, patches // grid)) for patches, least, most in bounds)
    most = calibrate + select + report
    photographs = read_photographs(folder, size, manifest.preprocess, most, say=say, spread=True)
    first = {digest: i for i, digest in reversed(list(enumerate(photographs.digests)))}
    order = [first[digest] for digest in sorted(first)]
    if len(order) < LEAST:
        raise PhregError(
            f"images: {folder} holds {len(order)} different images that can be read, expected at least {LEAST}: they "
            "are shared out between ranges, choices and the report."
        )
    quarter = len(order) // 4
    reported = len(order) - min(report, quarter)
    selected = reported - min(select, quarter)
    return Shares(
        photographs.subset(order[:selected]),
        photographs.subset(order[selected:reported]),
        photographs.subset(order[reported:]),
        grid + manifest.model.prefix_tokens,
    )


def feeds(feed: InputFeed, photographs: Photographs) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Yield graph inputs in the bundle's best batch size, each with the number of images that count.

    A last batch that is smaller than the bundle serves is filled up with copies of its last image.
    """
    lowest, best = feed.manifest.batches.lowest, feed.manifest.batches.best
    for start in range(0, len(photographs), best):
        batch = photographs.batch(start, start + best)
        yield feed(np.ascontiguousarray(pad_batch(batch, lowest))), len(batch)
