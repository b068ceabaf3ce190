"""Folders of images, and the one way in which an image becomes a model's uint8 input.

Knows nothing of models: it fits RGB images to a size, step for step as timm's evaluation transform does (PIL resize, centre crop), so that a runtime without torch sees the same pixels. Unlike timm it
turns photographs upright by their EXIF orientation, where ``Preprocess.exif`` says so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.images.decoding import read_image
from phreg_deploy.images.resampling import applies, shrink
from phreg_deploy.spec import Preprocess

KEEP_BYTES = 1 << 31
LONGEST = (
    100  # times the input size that one side may have after the resize, so that a hair-thin image takes no gigabytes
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def list_images(folder: Path | str, limit: int | None = None, spread: bool = False) -> list[Path]:
    """Every image file below ``folder``, in the order of their names.

    Args:
        limit: at most so many, the first ones; with ``spread``, evenly spaced ones, as frames of a video should be.

    Raises:
        PhregError: the folder is missing, is a file, or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise PhregError(f"images: got {folder}, where there is {found}; expected a folder of images.")
    paths = sorted(
        (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()),
        key=lambda p: str(p.relative_to(folder)),
    )
    if not paths:
        raise PhregError(f"images: {folder} holds no image; expected files that end in {', '.join(sorted(SUFFIXES))}.")
    if spread and limit is not None and len(paths) > limit:
        return [paths[i * len(paths) // limit] for i in range(limit)]
    return paths[:limit]


def read_fitted(path: Path | str, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """An image file at the model's input size: uint8 ``(H, W, 3)``. Raises what ``read_image`` and ``fit`` raise."""
    return fit(read_image(path, preprocess.exif), size, preprocess)


def fit(image: Image.Image | np.ndarray, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """An RGB image, or uint8 ``(H, W, 3)``, at the model's input size: uint8 ``(H, W, 3)``, values 0-255.

    The same rounding as timm's ``create_transform(..., crop_mode=...)`` on a PIL image: bit for bit, but for large images
    where ``preprocess.fast``: see ``resampling``.

    Raises:
        PhregError: an image so long and narrow that it would take gigabytes.
    """
    height, width = size
    old = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    new = _resized(old, size, preprocess)
    if max(new) > LONGEST * max(size):
        raise PhregError(
            f"image: got {old[0]}x{old[1]} pixels, too long and narrow for {height}x{width}; cut it into parts."
        )
    left, top = round((new[0] - width) / 2), round((new[1] - height) / 2)
    box = (left, top, left + width, top + height)
    if resizes_fast(old, size, preprocess):
        return shrink(image, new, box, preprocess.interpolation)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if old != new:
        picture = picture.resize(new, RESAMPLING[preprocess.interpolation])
    return np.array(picture.crop(box), dtype=np.uint8)  # a copy, since PyTorch warns of arrays that are read-only


def resizes_fast(old: tuple[int, int], size: tuple[int, int], preprocess: Preprocess) -> bool:
    """Whether ``fit`` takes ``resampling.shrink`` for an image of (width, height) pixels, and not Pillow."""
    return preprocess.fast and applies(old, _resized(old, size, preprocess), preprocess.interpolation)


def _resized(old: tuple[int, int], size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """(width, height) of the whole image before the centre is cut out, from its own (width, height)."""
    full = (math.floor(size[0] / preprocess.crop_pct), math.floor(size[1] / preprocess.crop_pct))
    if preprocess.crop_mode == "squash":
        return full[1], full[0]
    w, h = old
    if size[0] == size[1]:  # torchvision's Resize(int): the short side to the size, the long side cut to whole pixels
        return (full[0], int(full[0] * h / w)) if w <= h else (int(full[0] * w / h), full[0])
    ratio = min(h / full[0], w / full[1])  # timm's ResizeKeepRatio: scale until both sides cover the input
    return round(w / ratio), round(h / ratio)


@dataclass
class Photographs:
    """Readable images of a folder at one size, and what was skipped.

    ``names`` are paths relative to ``folder``, ``digests`` the sha256 of each file's bytes. ``skipped`` maps the name
    of each unreadable file to the reason. Pixels are kept in memory up to ``KEEP_BYTES`` and decoded again beyond.
    """

    folder: Path
    size: tuple[int, int]
    preprocess: Preprocess
    names: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def array(self, index: int) -> np.ndarray:
        """One image, uint8 ``(H, W, 3)``."""
        array = self.kept.get(self.names[index])
        return read_fitted(self.folder / self.names[index], self.size, self.preprocess) if array is None else array

    def batch(self, start: int, stop: int) -> np.ndarray:
        """Images ``start`` to ``stop``, uint8 ``(B, H, W, 3)``."""
        return np.stack([self.array(i) for i in range(start, min(stop, len(self)))])

    def digest(self) -> str:
        """One sha256 over the files' digests in order: the identity of this set of images."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def subset(self, keep: Iterable[int]) -> Photographs:
        """Some of the images, in the order given; pixels are shared."""
        rows = list(keep)
        return replace(self, names=[self.names[i] for i in rows], digests=[self.digests[i] for i in rows])

    @property
    def skip_line(self) -> str | None:
        """What was skipped, for people; None where nothing was."""
        if not self.skipped:
            return None
        name, reason = next(iter(self.skipped.items()))
        return f"Skipped {len(self.skipped)} unreadable file{'s' * (len(self.skipped) > 1)} in {self.folder}, e.g. {name}: {reason}"


def read_photographs(
    folder: Path | str,
    size: tuple[int, int],
    preprocess: Preprocess,
    limit: int | None = None,
    say: Callable[[str], None] = lambda _text: None,
    spread: bool = False,
) -> Photographs:
    """Read and fit every image of a folder; unreadable files are skipped, counted and named.

    Args:
        size: (height, width) in pixels. limit, spread: see ``list_images``.
        say: gets, in one line, what was skipped.

    Raises:
        PhregError: no folder, no image, or none that can be read.
    """
    folder = Path(folder)
    found, kept = Photographs(folder, size, preprocess), 0
    for path in list_images(folder, limit, spread):
        name = str(path.relative_to(folder))
        try:
            array = read_fitted(path, size, preprocess)
        except PhregError as error:
            found.skipped[name] = str(error)
            continue
        found.names.append(name)
        found.digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        if kept + array.nbytes <= KEEP_BYTES:
            found.kept[name] = array
            kept += array.nbytes
    if not found.names:
        name, reason = next(iter(found.skipped.items()))
        raise PhregError(
            f"images: none of the {len(found.skipped)} image files in {folder} can be read. The first, {name}: {reason}"
        )
    if found.skip_line:
        say(found.skip_line)
    return found
