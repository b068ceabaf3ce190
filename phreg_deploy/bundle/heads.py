"""``ServedHead``: a head in a bundle's graph. B batch, (Hp, Wp) patch grid, (H, W) image, K classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.layers import DEPTH, HEADS, LABELS, SEGMENTATION
from phreg_deploy.spec import Stored

# Beyond this the exponential leaves float32.
LARGEST_EXPONENT = 80.0
MOST_CLASSES = 256
# How ``attach --upsample`` enlarges a map.
BILINEAR, JOINT_BILATERAL = "bilinear", "joint-bilateral"
UPSAMPLING = (BILINEAR, JOINT_BILATERAL)
# Shorter features are divided by this length when they are normalised.
LEAST_NORM = 1e-12
# A number names a layer.
NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True)
class PromptRule:
    """How scores of S text embeddings become scores of K classes; it is part of the graph, not of the manifest.

    A class's score is the largest of its embeddings', which are ``counts[k]`` neighbours each, in the order of classes.
    ``background``: log of the probability, by the softmax over all embeddings, below which a place is background, or
    None. ``first``: whether class 0 is the background; otherwise background becomes a class of its own before them.
    """

    counts: tuple[int, ...]
    background: float | None = None
    first: bool = False


@dataclass(frozen=True)
class ServedHead(Stored):
    """A linear head whose result is an output of the graph.

    ``kind``: "segmentation" (logits float32 ``(B, Hp, Wp, K)``), "labels" (uint8 ``(B, Hp, Wp)``) or "depth" (float32
    ``(B, Hp, Wp)``). ``name``: "" for the only head of a kind. ``upsampling``: None for one answer per patch; with a
    method of ``UPSAMPLING`` there is one for every ``stride`` pixels of the input, ``(H / stride, W / stride)``.
    ``layers``: that it reads, None for the last. ``classes``, ``colours`` (8-bit RGB), ``ignore``: as of
    ``heads.Head``; without classes for depth.
    """

    name: str
    kind: str
    upsampling: str | None
    stride: int | None
    layers: tuple[int, ...] | None
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] | None
    ignore: int | None

    def __post_init__(self) -> None:
        if self.kind not in HEADS:
            raise PhregError(f"head: got the kind {self.kind!r}, expected {', '.join(HEADS[:-1])} or {HEADS[-1]}.")
        if not isinstance(self.name, str) or (self.name and not NAME.fullmatch(self.name)):
            raise PhregError(
                f"head: got the name {str(self.name)[:60]!r}, expected small letters, digits, _ and -, "
                "and a letter first."
            )
        check_upsampling(self.upsampling, 1 if self.stride is None else self.stride)
        if (self.upsampling is None) != (self.stride is None):
            raise PhregError(f"head: got {self.upsampling} upsampling and the stride {self.stride}, expected both.")
        count = len(self.classes)
        if (count == 0) != (self.kind == DEPTH) or count > MOST_CLASSES:
            raise PhregError(
                f"head: got {count} classes for {self.kind}, expected 1 to {MOST_CLASSES}, and none for depth."
            )
        if self.colours is not None and len(self.colours) != count:
            raise PhregError(f"head: got {len(self.colours)} colours, expected one for each of {count} classes.")

    @property
    def output(self) -> str:
        """The name of the graph's output: ``segmentation``, or ``segmentation.street``."""
        return f"{self.kind}.{self.name}" if self.name else self.kind

    @property
    def dtype(self) -> str:
        return "uint8" if self.kind == LABELS else "float32"

    def cells(self, patch: Sequence[int]) -> tuple[int, int]:
        """Return how many answers (down, across) a patch of (height, width) pixels has.

        Raises:
            PhregError: the stride does not divide the patch.
        """
        if self.stride is None:
            return 1, 1
        if any(side % self.stride for side in patch):
            fits = [str(n) for n in range(1, min(patch) + 1) if not any(side % n for side in patch)]
            raise PhregError(
                f"head: got the stride {self.stride}, expected one that divides the patch, {patch[0]}x{patch[1]}: "
                f"{', '.join(fits)}."
            )
        return patch[0] // self.stride, patch[1] // self.stride

    def shape(self, batch: Any, places: Sequence[Any]) -> tuple[Any, ...]:
        """Return the output's shape for a batch of images with answers at so many ``places`` (down, across)."""
        channels = (len(self.classes),) if self.kind == SEGMENTATION else ()
        return (batch, *places, *channels)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ServedHead:
        """Build it from JSON. Raises ``PhregError`` for unknown keys, wrong types and impossible values."""
        raw = dict(data) if isinstance(data, dict) else data
        if isinstance(raw, dict):
            if "upsampled" in raw:
                # Older than other strides and methods.
                old = raw.pop("upsampled")
                raw |= {"upsampling": {True: BILINEAR, False: None}.get(old, old), "stride": 1 if old is True else None}
            colours, layers, classes = raw.get("colours"), raw.get("layers"), raw.get("classes")
            fits = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
            fits = fits and (layers is None or _numbers(layers, 1, 1 << 20))
            fits = fits and (colours is None or (isinstance(colours, (list, tuple)) and all(map(_colour, colours))))
            fits = fits and isinstance(raw.get("upsampling"), (str, type(None))) and isinstance(raw.get("kind"), str)
            fits = fits and (raw.get("stride") is None or _numbers([raw["stride"]], 1, 1 << 20))
            fits = fits and (raw.get("ignore") is None or _numbers([raw["ignore"]], 0, 255))
            if not fits:
                raise PhregError(f"manifest: got the head {str(data)[:80]}, expected another one; it is damaged.")
            raw["colours"] = None if colours is None else tuple(tuple(colour) for colour in colours)
        return super().from_json(raw)


def check_upsampling(method: str | None, stride: int) -> None:
    """Raise ``PhregError`` for a method that is not known, or a stride without one."""
    if method not in (None, *UPSAMPLING):
        raise PhregError(f"upsample: got {method!r}, expected {' or '.join(UPSAMPLING)}.")
    if type(stride) is not int or stride < 1:
        raise PhregError(f"stride: got {stride!r}, expected the pixels of the input per answer, e.g. 4.")
    if method is None and stride != 1:
        raise PhregError(f"stride: got {stride} without upsampling; expected both: --upsample bilinear --stride 4.")


def _numbers(values: Any, least: int, most: int) -> bool:
    fits = isinstance(values, (list, tuple)) and len(values) > 0
    return fits and all(type(value) is int and least <= value <= most for value in values)


def _colour(value: Any) -> bool:
    return _numbers(value, 0, 255) and len(value) == 3
