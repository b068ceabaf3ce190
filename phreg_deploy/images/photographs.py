"""Read folders of images, and fit RGB images to a model's input size.

The steps are those of timm's evaluation transform (PIL resize, centre crop), so a runtime without torch sees the same
pixels. Unlike timm, photographs are turned upright by their EXIF orientation where ``Preprocess.exif`` says so.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.images.decoding import LARGEST_SIDE, read_image
from phreg_deploy.images.resampling import applies, shrink
from phreg_deploy.spec import Preprocess

# Bytes of pixels that ``Photographs`` keeps in memory.
KEEP_BYTES = 1 << 31
# A side may have at most so many times the input size after the resize: a hair-thin image would take gigabytes.
LONGEST = 100
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def list_images(folder: Path | str, limit: int | None = None, spread: bool = False) -> list[Path]:
    """List every image file below ``folder``, sorted by name. Links to folders are followed.

    Args:
        limit: the largest number of files; the first ones, or with ``spread`` evenly spaced ones, as for a video.

    Raises:
        PhregError: the folder is missing, is a file, holds no image, or holds a folder that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise PhregError(f"images: got {folder}, where there is {kind}; expected a folder of images.")
    paths = sorted(
        (p for p in files_below(folder) if p.suffix.lower() in SUFFIXES),
        key=lambda p: str(p.relative_to(folder)),
    )
    if not paths:
        raise PhregError(f"images: {folder} holds no image; expected files that end in {', '.join(sorted(SUFFIXES))}.")
    if spread and limit is not None and len(paths) > limit:
        return [paths[i * len(paths) // limit] for i in range(limit)]
    return paths[:limit]


def files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield every file below ``folder``, in any order.

    Args:
        above: device and inode of the folders above. A link to one of them is not followed.

    Raises:
        PhregError: a folder cannot be read.
    """
    try:
        status = folder.stat()
        own = (status.st_dev, status.st_ino)
        entries = [] if own in above else list(os.scandir(folder))
    except OSError as error:
        raise PhregError(f"images: the folder {folder} cannot be read ({error.strerror}).") from None
    for entry in entries:
        if entry.is_dir():
            yield from files_below(Path(entry.path), above | {own})
        elif entry.is_file():
            yield Path(entry.path)


def read_fitted(path: Path | str, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """Read an image file at the model's input size: uint8 ``(H, W, 3)``. Errors: see ``read_image`` and ``fit``."""
    return fit(read_image(path, preprocess.exif), size, preprocess)


def fit(image: Image.Image | np.ndarray, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """Fit an RGB image, or uint8 ``(H, W, 3)``, to the model's input size: uint8 ``(H, W, 3)``, values 0-255.

    Equal bit for bit to timm's ``create_transform(..., crop_mode=...)`` on a PIL image, except for large images with
    ``preprocess.fast``, see ``resampling``.

    Raises:
        PhregError: an image so long and narrow that it would take gigabytes.
    """
    old = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    new, box = placement(old, size, preprocess)
    if resizes_fast(old, size, preprocess):
        return shrink(image, new, box, preprocess.interpolation)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if old != new:
        picture = picture.resize(new, RESAMPLING[preprocess.interpolation])
    # A copy, since PyTorch warns of read-only arrays.
    return np.array(picture.crop(box), dtype=np.uint8)


def placement(
    old: tuple[int, int], size: tuple[int, int], preprocess: Preprocess
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Where the input of ``size`` (height, width) lies in an image of ``old`` (width, height) pixels after its resize.

    Returns (width, height) after the resize, and the (left, top, right, bottom) of the input there.

    Raises:
        PhregError: an image so long and narrow that it would take gigabytes.
    """
    height, width = size
    new = _resized(old, size, preprocess)
    if max(new) > LONGEST * max(size) or max(old) > LARGEST_SIDE:
        got = f"{old[0]}x{old[1]}"
        raise PhregError(f"image: got {got} pixels, too long and narrow for {height}x{width}; cut it into parts.")
    left, top = round((new[0] - width) / 2), round((new[1] - height) / 2)
    return new, (left, top, left + width, top + height)


def resizes_fast(old: tuple[int, int], size: tuple[int, int], preprocess: Preprocess) -> bool:
    """Whether ``fit`` resizes an image of (width, height) pixels by ``resampling.shrink``, not by Pillow."""
    return preprocess.fast and applies(old, _resized(old, size, preprocess), preprocess.interpolation)


def _resized(old: tuple[int, int], size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Return the (width, height) to which an image of (width, height) ``old`` is resized before the centre crop."""
    full = (math.floor(size[0] / preprocess.crop_pct), math.floor(size[1] / preprocess.crop_pct))
    if preprocess.crop_mode == "squash":
        return full[1], full[0]
    w, h = old
    # torchvision's Resize(int): the short side gets the size, the long side is rounded down.
    if size[0] == size[1]:
        return (full[0], int(full[0] * h / w)) if w <= h else (int(full[0] * w / h), full[0])
    # timm's ResizeKeepRatio: scale until both sides cover the input.
    ratio = min(h / full[0], w / full[1])
    return round(w / ratio), round(h / ratio)


@dataclass
class Photographs:
    """The readable images of a folder at one size, and the names of the unreadable ones.

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
        """Return one image, uint8 ``(H, W, 3)``."""
        array = self.kept.get(self.names[index])
        return read_fitted(self.folder / self.names[index], self.size, self.preprocess) if array is None else array

    def batch(self, start: int, stop: int) -> np.ndarray:
        """Return the images ``start`` to ``stop``, uint8 ``(B, H, W, 3)``."""
        return np.stack([self.array(i) for i in range(start, min(stop, len(self)))])

    def digest(self) -> str:
        """Return a sha256 over the files' digests in order, which identifies this set of images."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def subset(self, keep: Iterable[int]) -> Photographs:
        """Return the images at the indices ``keep``, in this order; pixels are shared."""
        rows = list(keep)
        return replace(self, names=[self.names[i] for i in rows], digests=[self.digests[i] for i in rows])

    @property
    def skip_line(self) -> str | None:
        """A line about the skipped files, for users; None if there are none."""
        if not self.skipped:
            return None
        name, reason = next(iter(self.skipped.items()))
        files = f"{len(self.skipped)} unreadable file{'s' * (len(self.skipped) > 1)}"
        return f"Skipped {files} in {self.folder}, e.g. {name}: {reason}"


def read_photographs(
    folder: Path | str,
    size: tuple[int, int],
    preprocess: Preprocess,
    limit: int | None = None,
    say: Callable[[str], None] = lambda _text: None,
    spread: bool = False,
) -> Photographs:
    """Read and fit every image of a folder; skip unreadable files and name them.

    Args:
        size: (height, width) in pixels. limit, spread: see ``list_images``.
        say: is called with a line about the skipped files.

    Raises:
        PhregError: no folder, no image, or no readable one.
    """
    folder = Path(folder)
    photographs, kept_bytes = Photographs(folder, size, preprocess), 0
    for path in list_images(folder, limit, spread):
        name = str(path.relative_to(folder))
        try:
            array = read_fitted(path, size, preprocess)
        except PhregError as error:
            photographs.skipped[name] = str(error)
            continue
        photographs.names.append(name)
        photographs.digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        if kept_bytes + array.nbytes <= KEEP_BYTES:
            photographs.kept[name] = array
            kept_bytes += array.nbytes
    if not photographs.names:
        name, reason = next(iter(photographs.skipped.items()))
        count = len(photographs.skipped)
        raise PhregError(
            f"images: none of the {count} image files in {folder} can be read. The first, {name}: {reason}"
        )
    if photographs.skip_line:
        say(photographs.skip_line)
    return photographs
