"""NV12 frames, as cameras and video decoders give them, and their conversion to RGB.

NV12 has a plane of luma at full size and a plane of interleaved chroma (Cb, Cr) at half the width and height.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from phreg_deploy.errors import PhregError

# Kr and Kb of ITU-R BT.601 and BT.709: the weights of red and blue in luma.
MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
# Rows that are converted at once, to bound memory.
STRIP = 64
# Bits of the fraction of the factors.
BITS = 16


class YuvFactors(NamedTuple):
    """Integers that turn luma and chroma into RGB. All but ``luma_zero`` are times 2**16.

    red = luma * (Y - luma_zero) + red_v * (V - 128), and so on; the sum is rounded to a whole grey level and clipped.
    """

    luma_zero: int
    luma: int
    red_v: int
    green_u: int
    green_v: int
    blue_u: int


@dataclass(frozen=True)
class Nv12Frame:
    """An NV12 frame in the host's memory or a GPU's, which an extractor takes as an image.

    ``y``: uint8 ``(H, W)`` or ``(H, W, 1)``. ``uv``: uint8 ``(H / 2, W / 2, 2)`` or ``(H / 2, W)``. Rows may be longer
    than the image (a pitch). ``matrix``: "bt601" or "bt709"; None takes BT.709 above 576 rows and BT.601 up to there,
    as GStreamer does for video without a mark. ``limited``: luma is 16-235 and chroma 16-240, as in almost all video;
    False for 0-255, as from many USB cameras and JPEG. A pair of chroma serves its four pixels unchanged.

    Raises:
        PhregError: another matrix.
    """

    y: Any
    uv: Any
    matrix: str | None = None
    limited: bool = True

    def __post_init__(self) -> None:
        if self.matrix is not None and self.matrix not in MATRICES:
            raise PhregError(f"matrix: got {self.matrix!r}, expected {' or '.join(MATRICES)}, or None.")

    @classmethod
    def of(cls, array: Any, matrix: str | None = None, limited: bool = True) -> Nv12Frame:
        """The frame in one array ``(3 H / 2, W)`` with chroma below luma, as OpenCV and GStreamer's appsink give it.

        Raises:
            PhregError: an array of another shape, or another matrix.
        """
        shape = tuple(getattr(array, "shape", ()))
        if len(shape) not in (2, 3) or shape[2:] not in ((), (1,)) or shape[0] % 3:
            raise PhregError(f"NV12: got {type(array).__name__} {shape}, expected an array (3 H / 2, W).")
        rows = shape[0] // 3 * 2
        flat = array if len(shape) == 2 else array[..., 0]
        return cls(flat[:rows], flat[rows:], matrix, limited)

    def factors(self, height: int) -> YuvFactors:
        """The factors for a frame of ``height`` rows. Their source is ITU-R BT.601 and BT.709, as BT.2100 writes it."""
        red, blue = MATRICES[self.matrix or ("bt709" if height > 576 else "bt601")]
        green = 1 - red - blue
        luma, chroma = (255 / 219, 255 / 224) if self.limited else (1.0, 1.0)
        scales = (
            luma,
            2 * (1 - red) * chroma,
            -2 * (1 - blue) * blue / green * chroma,
            -2 * (1 - red) * red / green * chroma,
            2 * (1 - blue) * chroma,
        )
        return YuvFactors(16 if self.limited else 0, *(round(scale * (1 << BITS)) for scale in scales))

    def rgb(self) -> np.ndarray:
        """The frame in RGB: uint8 ``(H, W, 3)``, for planes in the host's memory.

        Raises:
            PhregError: planes of other shapes or types.
        """
        luma, pairs = np.asarray(self.y), np.asarray(self.uv)
        height, width = check_planes(luma.shape, pairs.shape, luma.dtype, pairs.dtype)
        luma, pairs = luma.reshape(height, width), pairs.reshape(height // 2, width // 2, 2)
        zero, scale, red_v, green_u, green_v, blue_u = self.factors(height)
        out = np.empty((height, width, 3), np.uint8)
        for start in range(0, height, STRIP):
            part = slice(start, start + STRIP)
            light = (luma[part].astype(np.int32) - zero) * scale + (1 << (BITS - 1))
            # At the full width, and at half the height until the sum.
            wide = np.repeat(pairs[start // 2 : (start + STRIP) // 2].astype(np.int32) - 128, 2, axis=1)
            u, v = wide[..., 0], wide[..., 1]
            for channel, colour in enumerate((red_v * v, green_u * u + green_v * v, blue_u * u)):
                out[part, :, channel] = np.clip((light + np.repeat(colour, 2, axis=0)) >> BITS, 0, 255)
        return out


def check_planes(luma: tuple[int, ...], chroma: tuple[int, ...], *dtypes: np.dtype[Any]) -> tuple[int, int]:
    """Return the (height, width) of an NV12 frame. Raises ``PhregError`` unless the planes are those of one."""
    got = f"NV12: got y {dtypes[0]} {luma} and uv {dtypes[-1]} {chroma}"
    if any(dtype != np.uint8 for dtype in dtypes):
        raise PhregError(f"{got}, expected uint8. 10-bit video (P010) is not read; convert it to NV12.")
    flat = luma[:2] if luma[2:] in ((), (1,)) else ()
    if len(flat) != 2 or 0 in flat:
        raise PhregError(f"{got}, expected y as (H, W) with at least two pixels a side.")
    height, width = flat
    if height % 2 or width % 2:
        raise PhregError(f"{got}, expected an even height and width, which NV12 has.")
    if chroma not in ((height // 2, width // 2, 2), (height // 2, width)):
        raise PhregError(f"{got}, expected uv as {(height // 2, width // 2, 2)} or {(height // 2, width)}.")
    return height, width
