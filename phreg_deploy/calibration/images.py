"""Which photographs do what: ranges, choices and the report share no image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.bundle import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.photographs import Photographs, read_photographs

CALIBRATE, SELECT, REPORT = 64, 32, 64
PATCHES = 8192  # to choose on: larger inputs have more patches each, and need fewer images
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
    """Up to 64 images for ranges, 32 for choices and 64 for the report; fewer are shared out as 2 : 1 : 1.

    Which image goes where is decided by its digest alone, and copies of one image count once.

    Raises:
        PhregError: fewer than 8 different images.
    """
    size, patch = manifest.sizes.default, manifest.model.patch
    grid = (size[0] // patch[0]) * (size[1] // patch[1])
    select = min(SELECT, max(LEAST, PATCHES // grid))
    report = min(REPORT, 2 * select)
    found = read_photographs(folder, size, manifest.preprocess, CALIBRATE + select + report, say=say, spread=True)
    first = {digest: i for i, digest in reversed(list(enumerate(found.digests)))}
    order = [first[digest] for digest in sorted(first)]
    if len(order) < LEAST:
        raise PhregError(
            f"images: {folder} holds {len(order)} different images that can be read, expected at least {LEAST}: they are shared out "
            "between ranges, choices and the report."
        )
    part = len(order) / (CALIBRATE + select + report)
    ends = (round(part * CALIBRATE), round(part * (CALIBRATE + select)))
    return Shares(
        found.subset(order[: ends[0]]),
        found.subset(order[ends[0] : ends[1]]),
        found.subset(order[ends[1] :]),
        grid + manifest.model.prefix_tokens,
    )
