"""Which photographs do what: ranges, choices and the report share no image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.bundle import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.photographs import Photographs, read_photographs

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


def share_out(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> Shares:
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
