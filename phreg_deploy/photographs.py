"""Folders of images, and the one way in which an image becomes a model's uint8 input.

Knows nothing of models: it turns files of any mode into RGB and fits them to a size, step for step as timm's
evaluation transform does (PIL resize, centre crop), so that a runtime without torch sees the same pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Preprocess

KEEP_BYTES = 1 << 31
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB. 16-bit grey is scaled by 1/257, alpha is dropped (as timm does), CMYK converted.

    Raises:
        PhregError: a mode without a defined scale (32-bit integer or float pixels).
    """
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise PhregError(
                f"image: got mode {image.mode!r} with values up to {grey.max()}, expected 16-bit grey (0-65535) or 8-bit pixels."
            )
        return Image.fromarray((grey / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PhregError(
            "image: got 32-bit float pixels (mode 'F'), whose scale is unknown; expected 8-bit or 16-bit pixels."
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns of the direct way, which gives the same
    return image.convert("RGB")


def read_image(path: Path | str) -> Image.Image:
    """The file as an RGB image.

    Raises:
        PhregError: missing, empty, truncated, or no image.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError:
        raise PhregError(f"image: there is no file {path}.") from None
    except UnidentifiedImageError:
        size = path.stat().st_size
        raise PhregError(
            f"image: {path} is {'empty' if size == 0 else 'not an image that Pillow can read'}; expected JPEG, PNG, WebP, TIFF or BMP."
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PhregError(f"image: {path} cannot be read ({error}); it is truncated or damaged. Replace it.") from None


def fit(image: Image.Image, size: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """An RGB image at the model's input size: uint8 ``(H, W, 3)``, values 0-255.

    The same rounding as timm's ``create_transform(..., crop_mode=...)`` on a PIL image: bit for bit.
    """
    height, width = size
    resampling = RESAMPLING[preprocess.interpolation]
    if preprocess.crop_mode == "squash":
        full = (math.floor(height / preprocess.crop_pct), math.floor(width / preprocess.crop_pct))
        image = image.resize((full[1], full[0]), resampling) if image.size != (full[1], full[0]) else image
    elif height == width:  # torchvision's Resize(int): the short side to the size, the long side cut to whole pixels
        short = math.floor(height / preprocess.crop_pct)
        w, h = image.size
        new = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
        image = image.resize(new, resampling) if image.size != new else image
    else:  # timm's ResizeKeepRatio: scale until both sides cover the input
        full = (math.floor(height / preprocess.crop_pct), math.floor(width / preprocess.crop_pct))
        ratio = min(image.size[1] / full[0], image.size[0] / full[1])
        new = (round(image.size[0] / ratio), round(image.size[1] / ratio))
        image = image.resize(new, resampling) if image.size != new else image
    top, left = round((image.size[1] - height) / 2), round((image.size[0] - width) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)


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
        return fit(read_image(self.folder / self.names[index]), self.size, self.preprocess) if array is None else array

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
        say: told, in one line, what was skipped.

    Raises:
        PhregError: no folder, no image, or none that can be read.
    """
    folder = Path(folder)
    found, kept = Photographs(folder, size, preprocess), 0
    for path in list_images(folder, limit, spread):
        name = str(path.relative_to(folder))
        try:
            array = fit(read_image(path), size, preprocess)
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
