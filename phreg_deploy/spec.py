"""Define what every student and bundle stores: the model, its preprocessing, the sizes and batches that it serves.

This is the only place for such constants (mean, patch size, interpolation).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from phreg_deploy.errors import PhregError

S = TypeVar("S", bound="Stored")


def plain(value: Any) -> Any:
    """Convert what a dictionary, list or tuple holds to JSON: paths to text, objects by their ``to_json``."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(entry) for entry in value)
    if isinstance(value, Path):
        return str(value)
    return value.to_json() if hasattr(value, "to_json") else value


class Stored:
    """A dataclass with conversion to JSON and back."""

    def to_json(self) -> dict[str, Any]:
        return dict(plain(vars(self)))

    @classmethod
    def from_json(cls: type[S], data: dict[str, Any]) -> S:
        """Build the dataclass; raises ``PhregError`` for unknown or missing keys and names them."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(data, dict) or set(data) != known:
            got = sorted(data) if isinstance(data, dict) else type(data).__name__
            name = cls.__name__
            raise PhregError(f"{name}: got the keys {got}, expected {sorted(known)}. The file is damaged or not ours.")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


@dataclass(frozen=True)
class ModelSpec(Stored):
    """The architecture of a model, as far as readers of its features need it.

    ``family``: "vit" (timm VisionTransformer) or "eva". ``patch``: (height, width) in pixels. ``grid``: the native
    (Hp, Wp) of its position embedding. The order of tokens is always [class, registers, patches], as in timm.
    """

    architecture: str
    family: str
    patch: tuple[int, int]
    grid: tuple[int, int]
    width: int
    depth: int
    heads: int
    class_token: bool
    registers: int
    parameters: int

    @property
    def prefix_tokens(self) -> int:
        return int(self.class_token) + self.registers


@dataclass(frozen=True)
class Preprocess(Stored):
    """How an image becomes the uint8 array that a model reads, with the steps of timm's evaluation transform.

    ``crop_mode`` "squash" resizes the whole image to the input size; "center" resizes the short side to
    size / ``crop_pct`` and cuts out the centre. ``mean`` and ``std`` are per RGB channel on a scale of 0-1. ``exif``:
    turn files upright by their EXIF orientation, which timm does not do. ``fast``: resize large images by
    ``resampling.shrink``. Files from before ``exif`` and ``fast`` existed mean False.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_mode: str
    crop_pct: float
    exif: bool = False
    fast: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Preprocess:
        return super().from_json({"exif": False, "fast": False, **data} if isinstance(data, dict) else data)

    def __post_init__(self) -> None:
        for name in ("exif", "fast"):
            if not isinstance(getattr(self, name), bool):
                raise PhregError(f"{name}: got {getattr(self, name)!r}, expected true or false.")
        if self.crop_mode not in ("squash", "center"):
            raise PhregError(f"crop mode: got {self.crop_mode!r}, expected 'squash' or 'center'.")
        got = self.interpolation
        if got not in ("bicubic", "bilinear", "lanczos", "nearest"):
            raise PhregError(f"interpolation: got {got!r}, expected bicubic, bilinear, lanczos or nearest.")


@dataclass(frozen=True)
class Sizes(Stored):
    """The input sizes that a bundle serves, (height, width) in pixels.

    ``mode``: "fixed" serves ``sizes[0]``, "list" any of ``sizes``, "range" all from ``sizes[0]`` to ``sizes[2]`` in
    steps of a patch, tuned for ``sizes[1]``.
    """

    mode: str
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sizes:
        raw = super().from_json(data)
        pairs = raw.sizes if isinstance(raw.sizes, tuple) else ()
        if not pairs or not all(isinstance(p, (list, tuple)) and [type(s) for s in p] == [int, int] for p in pairs):
            raise PhregError(f"Sizes: got the sizes {raw.sizes}, expected pairs of height and width.")
        return cls(raw.mode, tuple((h, w) for h, w in pairs))

    @classmethod
    def parse(cls, text: str, patch: tuple[int, int]) -> Sizes:
        """Read ``518``, ``480x640``, ``224,518,480x640`` (a list) or ``224:518:1036`` (a range).

        Raises:
            PhregError: the text has another form, or a side is not a multiple of the patch; the message names the two
                nearest.
        """
        parts = text.split(":") if ":" in text else text.split(",")
        sizes = tuple(_size(part.strip(), text, patch) for part in parts)
        if ":" in text:
            if len(sizes) != 3 or not all(a <= b <= c for a, b, c in zip(*sizes)):
                raise PhregError(f"image size: got {text!r}, expected MIN:OPT:MAX in growing order, e.g. 224:518:1036.")
            return cls("range", sizes)
        return cls("list" if len(sizes) > 1 else "fixed", sizes)

    @property
    def dynamic(self) -> bool:
        return self.mode != "fixed"

    @property
    def default(self) -> tuple[int, int]:
        return self.sizes[1] if self.mode == "range" else self.sizes[0]

    def check(self, size: tuple[int, int], patch: tuple[int, int]) -> None:
        """Raise ``PhregError`` unless ``size`` (height, width) is served."""
        served = size in self.sizes
        if self.mode == "range":
            sides = zip(self.sizes[0], size, self.sizes[-1], patch)
            served = all(low <= side <= high and side % step == 0 for low, side, high, step in sides)
        if not served:
            got = f"{size[0]}x{size[1]}"
            raise PhregError(f"image size: got {got}, expected {self}. Resize it, or export with --image-size {got}.")

    def __str__(self) -> str:
        names = [f"{h}x{w}" for h, w in self.sizes]
        return f"{names[0]} to {names[2]} in steps of a patch" if self.mode == "range" else " or ".join(names)


@dataclass(frozen=True)
class Batches(Stored):
    """The batch sizes that a bundle serves: ``lowest`` to ``highest``, tuned for ``best``."""

    lowest: int
    best: int
    highest: int

    @classmethod
    def parse(cls, text: str) -> Batches:
        """Read ``1`` or ``1:4:8``. Raises ``PhregError`` for anything else."""
        parts = text.split(":")
        if len(parts) not in (1, 3) or not all(p.strip().isdigit() for p in parts):
            raise PhregError(f"batch: got {text!r}, expected one number or MIN:OPT:MAX, e.g. 1:4:8.")
        numbers = [int(p) for p in parts] * (3 if len(parts) == 1 else 1)
        if not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise PhregError(f"batch: got {text!r}, expected numbers from 1 in growing order.")
        return cls(*numbers)

    @property
    def dynamic(self) -> bool:
        return self.lowest != self.highest

    def check(self, batch: int) -> None:
        """Raise ``PhregError`` unless a batch of so many images is served."""
        if not self.lowest <= batch <= self.highest:
            wider = f"{self.lowest}:{self.best}:{max(batch, self.highest)}"
            raise PhregError(f"batch: got {batch} images, expected {self}. Split it, or export with --batch {wider}.")

    def __str__(self) -> str:
        return f"{self.lowest} to {self.highest}" if self.dynamic else str(self.lowest)


def parse_size(text: str) -> tuple[int, int]:
    """Read ``518`` or ``480x640`` (height x width). Raises ``PhregError`` for anything else."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or int(match[1]) == 0 or match[2] == "0":
        raise PhregError(f"image size: got {text!r}, expected a number or HEIGHTxWIDTH, e.g. 518 or 480x640.")
    height = int(match[1])
    return height, int(match[2]) if match[2] else height


def check_multiple(size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise ``PhregError``, naming the nearest sizes that fit, unless both sides are multiples of the patch."""
    if any(s % p for s, p in zip(size, patch)):
        lower, upper = (tuple(max(1, s // p + up) * p for s, p in zip(size, patch)) for up in (0, 1))
        raise PhregError(
            f"image size: got {size[0]}x{size[1]}, expected multiples of the patch size {patch[0]}x{patch[1]}. "
            f"The nearest are {lower[0]}x{lower[1]} and {upper[0]}x{upper[1]}."
        )


def _size(part: str, text: str, patch: tuple[int, int]) -> tuple[int, int]:
    if not part:
        raise PhregError(f"image size: got {text!r}, expected e.g. 518, 480x640, 224,518 or 224:518:1036.")
    size = parse_size(part)
    check_multiple(size, patch)
    return size
