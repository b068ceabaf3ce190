"""Features of an image of any size, from overlapping windows of a size that the bundle serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.images.fitting import patch_mask
from phreg_deploy.images.windows import Windows, check_stride, cut
from phreg_deploy.layers import ATTENTION, CLS, kind_of
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.spec import Preprocess

# Is called with the number of windows that are done, and of all.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class TiledFeatures(DenseFeatures):
    """Features of one image from overlapping windows; ``(Hp, Wp)`` is the patch grid of the whole image, B is 1.

    ``features``, ``token_norm``, ``attention`` and those of ``layers`` are means over the windows that cover a patch,
    by the weights of ``Windows.weights``; ``cls`` is the plain mean over windows. Logits and depths of ``heads`` are
    blended too, per patch or pixel of the image, and classes are those of the window with the largest weight. ``mask``
    is False for patches of which less than half is image. ``windows``: where they lie. ``window_cls`` float32
    ``(N, C)`` or None, and ``window_artifact_rate`` float64 ``(N,)``: those of each window, in the windows' order,
    before the means.
    """

    windows: Windows | None = None
    window_cls: np.ndarray | None = None
    window_artifact_rate: np.ndarray | None = None


def window_sizes(manifest: Manifest, window: Any = None, stride: Any = None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Check a window and a stride: pixels as a number or (height, width).

    Args:
        window: a size that the bundle serves; None for its own or preferred one.
        stride: the largest step between windows; None for half the window.

    Raises:
        PhregError: a window that is not served, or a stride below a patch or above the window.
    """
    patch = manifest.model.patch
    size = manifest.sizes.default if window is None else _pair(window, "window")
    manifest.sizes.check(size, patch)
    if stride is None:
        return size, tuple(max(p, side // 2 // p * p) for side, p in zip(size, patch))  # type: ignore[return-value]
    step = _pair(stride, "stride")
    check_stride(step, size, patch)
    return size, step


def tile(
    image: Image.Image | np.ndarray,
    dense: Callable[[np.ndarray], DenseFeatures],
    manifest: Manifest,
    preprocess: Preprocess,
    size: tuple[int, int],
    stride: tuple[int, int],
    *,
    bgr: bool = False,
    report: Report | None = None,
) -> TiledFeatures:
    """Run ``dense`` on every window and blend the results; see ``TiledFeatures``.

    In memory at once are the image, the result, and one batch of windows with its features.

    Args:
        image: an RGB picture, or uint8 ``(H, W, 3)`` of any size.
        dense: ``FeatureExtractor.dense``. size, stride: of ``window_sizes``. bgr: the array is BGR.
    """
    pixels = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
    windows = Windows.over(pixels, size, stride, manifest.model.patch)
    blend = _Blend(windows, (pixels[0], pixels[1]), manifest.heads)
    for starts in _batches(iter(windows), manifest.batches.highest):
        blend.add(starts, dense(np.stack([cut(image, windows, start, preprocess, bgr) for start in starts])))
        if report is not None:
            report(blend.count, len(windows))
    return blend.result(manifest.norm_median)


class _Blend:
    """The weighted sum of the windows' outputs so far; ``pixels``: the image's (height, width)."""

    def __init__(self, windows: Windows, pixels: tuple[int, int], heads: tuple[ServedHead, ...]) -> None:
        self.windows, self.mask = windows, patch_mask(pixels, windows.grid, windows.patch)
        rows, columns = windows.weights()
        self._rows, self._columns = dict(zip(windows.rows, rows)), dict(zip(windows.columns, columns))
        self._pixels, self._heads = pixels, {head.output: head for head in heads}
        self._sums: dict[str, np.ndarray] = {}
        # The largest weight so far, for classes.
        self._largest: dict[str, np.ndarray] = {}
        self._tokens: dict[str, list[np.ndarray]] = {}
        self._rates: list[float] = []

    @property
    def count(self) -> int:
        """How many windows it holds."""
        return len(self._rates)

    def add(self, starts: list[tuple[int, int]], answers: DenseFeatures) -> None:
        for i, start in enumerate(starts):
            place = self.windows.inside(start)
            h, w = (part.stop - part.start for part in place)
            weights = self._rows[start[0]][:h, None] * self._columns[start[1]][None, :w]
            norms, mask = answers.token_norm[i : i + 1, :h, :w], self.mask[None, place[0], place[1]]
            # A window of one patch may lie outside the mask.
            rate = replace(answers, token_norm=norms, mask=mask).artifact_rate[0] if mask.any() else 0.0
            self._rates.append(float(rate))
            for name, value in answers.outputs().items():
                if kind_of(name) == CLS:
                    self._tokens.setdefault(name, []).append(value[i])
                elif kind_of(name) == ATTENTION:
                    self._blend(name, value[i].transpose(1, 2, 0), place, weights)
                else:
                    self._blend(name, value[i], place, weights)

    def _blend(self, name: str, value: np.ndarray, place: tuple[slice, slice], weights: np.ndarray) -> None:
        """Add a window's map, patches or pixels first."""
        rows, columns = place
        grid = self.windows.grid
        if name in self._heads:
            down, across = self._heads[name].cells(self.windows.patch)
            weights, grid = weights.repeat(down, 0).repeat(across, 1), (grid[0] * down, grid[1] * across)
            rows, columns = (slice(p.start * n, p.stop * n) for p, n in ((rows, down), (columns, across)))
        if name not in self._sums:
            self._sums[name] = np.zeros((*grid, *value.shape[2:]), value.dtype)
        part, own = value[: weights.shape[0], : weights.shape[1]], self._sums[name][rows, columns]
        if value.dtype != np.uint8:
            own += part * weights.reshape(*weights.shape, *(1,) * (part.ndim - 2))
            return
        largest = self._largest.setdefault(name, np.zeros(grid, np.float32))[rows, columns]
        better = weights > largest
        own[better], largest[better] = part[better], weights[better]

    def result(self, norm_median: float | None) -> TiledFeatures:
        tokens = {name: np.stack(parts) for name, parts in self._tokens.items()}
        outputs = {name: value.mean(0, keepdims=True, dtype=np.float32) for name, value in tokens.items()}
        for name, value in self._sums.items():
            stride = self._heads[name].stride if name in self._heads else None
            # Patches at the lower and right edge may be padding in part.
            sides = value.shape if stride is None else [-(-side // stride) for side in self._pixels]
            outputs[name] = value[: sides[0], : sides[1]][None]
        if ATTENTION in outputs:
            outputs[ATTENTION] = np.ascontiguousarray(outputs[ATTENTION].transpose(0, 3, 1, 2))
        blended = TiledFeatures.of(outputs, norm_median, tuple(self._heads.values())).masked(self.mask[None])
        rates = np.array(self._rates)
        return replace(blended, windows=self.windows, window_cls=tokens.get(CLS), window_artifact_rate=rates)


def _batches(starts: Iterator[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    while batch := list(islice(starts, most)):
        yield batch


def _pair(value: Any, what: str) -> tuple[int, int]:
    """Read a number of pixels, or (height, width)."""
    sides = (value, value) if np.ndim(value) == 0 else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
        raise PhregError(f"{what}: got {value!r}, expected pixels as a whole number or (height, width), e.g. 518.")
    return int(sides[0]), int(sides[1])
