"""Read ground truth: masks of classes, and maps of depth; and what each patch of a model's input has of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.images.overlays import voc_colours
from phreg_deploy.images.photographs import fit, list_images
from phreg_deploy.progress import Progress
from phreg_deploy.spec import Preprocess

# The value of pixels of no class after reading.
VOID = 255
# Bytes of truth kept in memory; beyond, files are read again.
KEEP_BYTES = 1 << 30
# A map may differ from its image in the ratio of its sides by so much.
RATIO = 0.02


@dataclass
class Masks:
    """Masks of classes; arrays are uint8 ``(H, W)`` with values below K, or ``VOID``.

    ``first``: the value that class 0 has in the files; smaller ones mean no class.
    """

    folder: Path
    files: dict[str, Path]
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ignore: int | None
    first: int = 0
    kept: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    task = "segmentation"

    def read(self, name: str) -> np.ndarray:
        """Read the mask of an image."""
        array = self.kept.get(name)
        return array if array is not None else _labels(self.files[name], self.ignore, self.first)

    def on_patches(self, name: str, size: tuple[int, int], grid: tuple[int, int], steps: Preprocess) -> np.ndarray:
        """Return the commonest class of each patch, int64 ``(Hp, Wp)``; -1 where void is commoner than any class."""
        pixels = at_input(self.read(name), size, steps)
        count, k = grid[0] * grid[1], len(self.classes)
        places = _patch_of_pixels(size, grid) * (k + 1) + np.where(pixels == VOID, k, pixels)
        votes = np.bincount(places.reshape(-1), minlength=count * (k + 1)).reshape(*grid, k + 1)
        label = votes.argmax(-1)
        return np.where(label == k, -1, label)


@dataclass
class Depths:
    """Maps of depth; arrays are float32 ``(H, W)`` in the unit of the truth, NaN where there is none."""

    folder: Path
    files: dict[str, Path]
    scale: float
    kept: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    task = "depth"

    def read(self, name: str) -> np.ndarray:
        """Read the depth of an image."""
        return _depth(self.files[name], self.scale)

    def on_patches(self, name: str, size: tuple[int, int], grid: tuple[int, int], steps: Preprocess) -> np.ndarray:
        """Return the mean log depth of each patch, float64 ``(Hp, Wp)``; NaN where less than half of it has a depth."""
        logs = np.log(at_input(self.read(name), size, steps)).reshape(-1)
        places, count, known = _patch_of_pixels(size, grid).reshape(-1), grid[0] * grid[1], ~np.isnan(logs)
        total = np.bincount(places[known], logs[known], count)
        counts, whole = np.bincount(places[known], minlength=count), np.bincount(places, minlength=count)
        return np.where(2 * counts >= whole, total / np.maximum(counts, 1), np.nan).reshape(grid)


Truth = Masks | Depths


def find_truth(images: Path, folder: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, Path], list[str]]:
    """Find the truth of each image: the file of the same path below ``folder``, with one of ``suffixes``.

    Returns:
        Files by the image's name, its path below ``images``, sorted; and the names of images without truth.

    Raises:
        PhregError: no folder, no image, or no image with a truth.
    """
    if not folder.is_dir():
        raise PhregError(f"truth: got {folder}, where there is no folder; expected one of masks or depth.")
    files, missing = {}, []
    for path in list_images(images):
        name = path.relative_to(images).as_posix()
        found = [p for s in suffixes if (p := folder / PurePosixPath(name).with_suffix(s)).is_file() and p != path]
        if found:
            files[name] = found[0]
        else:
            missing.append(name)
    if not files:
        expected = " or ".join(str(PurePosixPath(missing[0]).with_suffix(s)) for s in suffixes)
        raise PhregError(f"truth: {folder} holds nothing for the images, e.g. no {expected}; expected the same names.")
    return files, missing


def read_masks(
    files: dict[str, Path],
    folder: Path,
    classes: Path | None,
    ignore: int | None,
    progress: Progress,
    names: tuple[str, ...] | None = None,
    first: int = 0,
) -> Masks:
    """Read every mask, PNG with a palette or in grey, and find the classes.

    Args:
        classes: a file with one name a line, from class 0; None for as many classes as the masks have, by number.
        names: those that ``classes`` holds, where it is another kind of file. first: as of ``Masks``.

    Raises:
        PhregError: an unreadable mask, one in colours, or a value beyond the classes.
    """
    if names is None and classes is not None:
        names = _names(classes)
    masks, kept, highest, palette, odd = Masks(folder, files, (), (), ignore, first), 0, 0, None, ""
    with progress.task("masks", len(files)) as advance:
        for name, path in files.items():
            array = _labels(path, ignore, first)
            top = int(np.where(array == VOID, 0, array).max())
            if top > highest:
                highest, odd = top, str(path)
            palette = palette or _palette(path)
            if kept + array.nbytes <= KEEP_BYTES:
                masks.kept[name], kept = array, kept + array.nbytes
            advance()
    if names is not None and highest >= len(names):
        raise PhregError(
            f"masks: {odd} has the value {highest + first}, but {classes} names {len(names)} classes, from {first} to "
            f"{len(names) - 1 + first}. Add names, or give the value for no class by --ignore."
        )
    if highest < 1:
        raise PhregError(f"masks: {folder} holds {highest + 1} classes, expected at least two.")
    masks.classes = names or tuple(f"class {k}" for k in range(highest + 1))
    count = len(masks.classes)
    colours = (palette or ())[first:]
    masks.colours = colours[:count] if len(colours) >= count else voc_colours()[first : first + count]
    return masks


def at_input(truth: np.ndarray, size: tuple[int, int], steps: Preprocess) -> np.ndarray:
    """Bring a map ``(H, W)`` to the model's input as its image is, by the nearest pixel."""
    return truth.reshape(-1)[_pixels(truth.shape, size, replace(steps, interpolation="nearest", fast=False))]


def scored(truth: np.ndarray, size: tuple[int, int], steps: Preprocess) -> np.ndarray:
    """Return the map that predictions are compared with: the whole map, or the part that the model sees of it."""
    return truth if steps.crop_mode == "squash" and steps.crop_pct == 1 else at_input(truth, size, steps)


def check_sides(truth: np.ndarray, image: Image.Image, name: str) -> None:
    """Raise ``PhregError`` if a map has other proportions than its image."""
    ratio = (truth.shape[1] / truth.shape[0]) / (image.width / image.height)
    if abs(ratio - 1) > RATIO:
        raise PhregError(
            f"truth: that of {name} has {truth.shape[1]}x{truth.shape[0]} pixels, and the image {image.width}x"
            f"{image.height}; expected the same proportions."
        )


@functools.lru_cache(maxsize=8)
def _pixels(old: tuple[int, int], size: tuple[int, int], nearest: Preprocess) -> np.ndarray:
    """The index of the map's pixel for every pixel of the input, int64 ``size``; the index travels as a colour."""
    index = np.arange(old[0] * old[1]).reshape(old)
    image = Image.fromarray(np.stack([index >> 16, index >> 8 & 255, index & 255], -1).astype(np.uint8))
    red, green, blue = fit(image, size, nearest).astype(np.int64).transpose(2, 0, 1)
    return (red << 16) + (green << 8) + blue


@functools.lru_cache(maxsize=8)
def _patch_of_pixels(size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(s) * g // s for s, g in zip(size, grid))
    return rows[:, None] * grid[1] + columns


def _labels(path: Path, ignore: int | None, first: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise PhregError(
                    f"masks: {path} has the mode {image.mode}, expected a PNG with a palette or 8-bit grey whose "
                    "values are numbers of classes; convert colours to numbers first."
                )
            array = np.array(image.convert("L") if image.mode == "1" else image, np.uint8)
            array = np.minimum(array, 1) if image.mode == "1" else array
    except (OSError, SyntaxError, ValueError) as error:
        raise PhregError(f"masks: {path} cannot be read ({error}); replace it.") from None
    if array.size >= 1 << 24:
        raise PhregError(f"masks: {path} has {array.size} pixels, expected fewer than {1 << 24}.")
    if ignore is not None and ignore != VOID:
        array = np.where(array == ignore, VOID, array).astype(np.uint8)
    # Without ``first`` the values stay, 255 too.
    return np.where((array == VOID) | (array < first), VOID, array - first).astype(np.uint8) if first else array


def _palette(path: Path) -> tuple[tuple[int, int, int], ...] | None:
    with Image.open(path) as image:
        flat = image.getpalette() if image.mode == "P" else None
    return None if not flat else tuple(zip(*(iter(flat),) * 3))


def _names(path: Path) -> tuple[str, ...]:
    try:
        names: Sequence[str] = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PhregError(f"classes: {path} cannot be read ({error}); expected one name a line.") from None
    if not 2 <= len(names) < VOID or len(set(names)) < len(names):
        raise PhregError(f"classes: {path} has {len(names)} names, expected 2 to {VOID - 1}, each once.")
    return tuple(names)


def _depth(path: Path, scale: float) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            depth = np.load(path, allow_pickle=False).astype(np.float32)
        else:
            with Image.open(path) as image:
                if not image.mode.startswith("I"):
                    raise PhregError(
                        f"depth: {path} has the mode {image.mode}, expected a 16-bit PNG in grey, or .npy."
                    )
                depth = np.asarray(image).astype(np.float32) * np.float32(scale)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise PhregError(f"depth: {path} cannot be read ({error}); replace it.") from None
    depth = depth[..., 0] if depth.ndim == 3 and depth.shape[-1] == 1 else depth
    if depth.ndim != 2 or 0 in depth.shape or depth.size >= 1 << 24:
        raise PhregError(f"depth: {path} has the shape {depth.shape}, expected (H, W) of fewer than {1 << 24} pixels.")
    known = np.isfinite(depth) & (depth > 0)
    if not known.any():
        raise PhregError(f"depth: {path} holds no depth above 0; remove it, or its image.")
    return np.where(known, depth, np.nan).astype(np.float32)
