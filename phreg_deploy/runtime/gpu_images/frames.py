"""Read frames that lie in a GPU's memory: where their pixels are, in which layout, and what fills them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.images.nv12 import Nv12Frame, YuvFactors, check_planes
from phreg_deploy.runtime.gpu.arrays import place_of
from phreg_deploy.runtime.gpu.dlpack import Place

EXPECTED = "uint8 (H, W, 3) or (B, H, W, 3) on the GPU, or an Nv12Frame"


@dataclass(frozen=True)
class DeviceFrame:
    """A frame in device memory.

    ``pointer``: its pixels, or luma; ``pitch`` and ``step``: bytes from row to row and from pixel to pixel.
    ``chroma``, ``chroma_pitch``: NV12's second plane, with its ``factors``. ``streams``: those that fill it. ``owners``
    live as long as the frame.
    """

    pointer: int
    height: int
    width: int
    pitch: int
    step: int
    owners: tuple[Any, ...]
    streams: frozenset[int]
    chroma: int = 0
    chroma_pitch: int = 0
    factors: YuvFactors | None = None


def read_frames(value: Any, stream: int, device: int) -> list[DeviceFrame]:
    """The frames in an array on a GPU, or in an ``Nv12Frame`` of two.

    Args:
        value: uint8 ``(H, W, 3)`` or ``(B, H, W, 3)`` with any pitch of rows and any step of pixels, e.g. the first
            three channels of BGRA. stream: the stream that will read it. device: the GPU that will.

    Raises:
        PhregError: another type or shape, pixels that do not lie in rows, or an array on another GPU.
    """
    if isinstance(value, Nv12Frame):
        return [_read_nv12(value, stream, device)]
    place, streams = _read(value, stream, device)
    got = f"image: got {place.dtype} {place.shape} on the GPU"
    if place.dtype != np.uint8:
        raise PhregError(f"{got}, expected {EXPECTED}.")
    if len(place.shape) not in (3, 4) or place.shape[-1] != 3:
        hint = " Drop alpha: array[..., :3]." if place.shape[-1:] == (4,) else ""
        raise PhregError(f"{got}, expected {EXPECTED}.{hint}")
    if 0 in place.shape:
        raise PhregError(f"{got}, which holds no pixel; expected at least one.")
    strides = _strides(place)
    height, width = place.shape[-3:-1]
    pitch, step, channel = strides[-3:]
    if channel != 1 or (width > 1 and step < 3) or (height > 1 and pitch < (width - 1) * step + 3):
        raise PhregError(
            f"{got} with strides {strides}, expected rows of pixels: strides (pitch, 3, 1), with the pitch at least "
            f"{3 * width} bytes. Make it contiguous first."
        )
    frame = DeviceFrame(place.pointer, height, width, pitch, step, (place.owner,), streams)
    count = place.shape[0] if len(place.shape) == 4 else 1
    return [replace(frame, pointer=place.pointer + i * (strides[0] if count > 1 else 0)) for i in range(count)]


def _read_nv12(frame: Nv12Frame, stream: int, device: int) -> DeviceFrame:
    (luma, filled), (pairs, also_filled) = (_read(plane, stream, device) for plane in (frame.y, frame.uv))
    height, width = check_planes(luma.shape, pairs.shape, luma.dtype, pairs.dtype)
    pitches = []
    for place, steps in ((luma, (1, 1)), (pairs, (2, 1) if len(pairs.shape) == 3 else (1,))):
        strides = _strides(place)
        # An axis of one entry may have any stride.
        odd = [s for s, step, n in zip(strides[1:], steps, place.shape[1:]) if n > 1 and s != step]
        if odd or (place.shape[0] > 1 and strides[0] < width):
            raise PhregError(
                f"NV12: got strides {strides} for a plane {place.shape} on the GPU, expected contiguous rows that lie "
                f"at least {width} bytes apart."
            )
        pitches.append(strides[0])
    owners, factors = (luma.owner, pairs.owner), frame.factors(height)
    both = filled | also_filled
    return DeviceFrame(luma.pointer, height, width, pitches[0], 1, owners, both, pairs.pointer, pitches[1], factors)


def _read(value: Any, stream: int, device: int) -> tuple[Place, frozenset[int]]:
    place, filled = place_of(value, stream)
    # __cuda_array_interface__ does not name the GPU.
    if hasattr(value, "__dlpack_device__") and place.device[1] != device:
        raise PhregError(
            f"image: got an array on GPU {place.device[1]}, but the extractor runs on GPU {device}. "
            f"Load it with device={place.device[1]}."
        )
    return place, frozenset() if filled is None else frozenset((filled,))


def _strides(place: Place) -> tuple[int, ...]:
    """Bytes between neighbours along each axis, for uint8."""
    if place.strides is not None:
        return place.strides
    return tuple(int(np.prod(place.shape[axis + 1 :])) for axis in range(len(place.shape)))
