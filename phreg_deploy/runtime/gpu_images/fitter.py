"""Fit frames on a GPU to a model's input size: colours, resize, crop and padding by two launches of a kernel."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.images.fitting import Fitted, fitted_steps, padding_colour, patch_mask
from phreg_deploy.images.photographs import placement
from phreg_deploy.runtime.gpu.arrays import DeviceArray, stream_number
from phreg_deploy.runtime.gpu.closing import Closing
from phreg_deploy.runtime.gpu.cuda import Cuda, Event, Stream
from phreg_deploy.runtime.gpu.pool import OutputPool
from phreg_deploy.runtime.gpu_images.coefficients import height_first, weight_table
from phreg_deploy.runtime.gpu_images.frames import DeviceFrame, read_frames
from phreg_deploy.runtime.gpu_images.kernel import Pass, ResampleKernel
from phreg_deploy.spec import Preprocess

# Geometries whose weights stay on the GPU; the least recently used is dropped first.
MOST_GEOMETRIES = 32


@dataclass(frozen=True)
class FittedFrames:
    """``images``: uint8 RGB ``(B, H, W, 3)`` on the GPU. ``mask``: bool ``(B, Hp, Wp)`` on the host, True for patches
    of the image; None for all."""

    images: DeviceArray
    mask: np.ndarray | None = None

    def on_host(self) -> Fitted:
        """The only image, copied to the host. Raises ``PhregError`` for several."""
        if self.images.shape[0] != 1:
            raise PhregError(f"prepare: got {self.images.shape[0]} images, expected one.")
        return Fitted(self.images.numpy()[0], None if self.mask is None else self.mask[0])


@dataclass(frozen=True)
class _Geometry:
    """How frames of one size become the input: two passes, their weights on the GPU, and the rows between them.

    ``middle``: (height, width) between the passes. ``mask``: bool ``(Hp, Wp)`` or None.
    """

    passes: tuple[Pass, Pass]
    tables: tuple[DeviceArray, DeviceArray]
    middle: tuple[int, int]
    mask: np.ndarray | None


class GpuFitter(Closing):
    """Fits frames as ``images.fitting.fit_as`` does, to the byte where that resizes by Pillow. Several threads may use
    one fitter.

    The kernel is compiled at the first frame. Weights are uploaded once for each size of frames; arrays come from a
    pool. Afterwards a frame costs two launches, no allocation and no wait.

    Args:
        cuda: the GPU; each method selects it.
        patch: (height, width) of the model's patches.
    """

    def __init__(self, cuda: Cuda, patch: tuple[int, int]) -> None:
        self.cuda, self.patch = cuda, patch
        self._lock = threading.Lock()
        self._kernel: ResampleKernel | None = None
        self._stream: Stream | None = None
        self._pool = OutputPool(cuda)
        self._geometry = functools.lru_cache(MOST_GEOMETRIES)(self._make_geometry)

    def read(self, values: Sequence[Any], stream: int | None = None) -> list[DeviceFrame]:
        """The frames of ``values``, as ``read_frames`` takes them, for a ``fit`` in the same stream.

        Raises:
            BackendMissing: NVRTC is not installed, or does not compile for this GPU.
            PhregError: a frame of another type, or on another GPU.
        """
        with self.cuda.selected():
            handle = self._start()[1].handle if stream is None else stream
            return [frame for value in values for frame in read_frames(value, handle, self.cuda.index)]

    def fit(
        self,
        frames: Sequence[DeviceFrame],
        size: tuple[int, int],
        preprocess: Preprocess,
        name: str | None = None,
        bgr: bool = False,
        stream: int | None = None,
    ) -> FittedFrames:
        """Queue the fitting of frames.

        Args:
            frames: at least one.
            size: (height, width) of the input. preprocess, name, bgr: as of ``fit_as``; an ``Nv12Frame`` has no order.
            stream: the caller's ``cudaStream_t``; the frames are read in it. Without one they are read in a stream of
                the fitter's, which is the ``stream`` of the images; call ``wait`` before you change the frames.

        Raises:
            BackendMissing: as ``read``.
            PhregError: a frame that is too long and narrow.
        """
        with self.cuda.selected():
            kernel, own = self._start()
            handle = own.handle if stream is None else stream
            with self._lock:
                geometries = [self._geometry(frame.width, frame.height, size, preprocess, name) for frame in frames]
            try:
                self._order(frames, handle)
                images = self._queue(kernel, frames, geometries, size, bgr, handle)
            except BaseException:
                # Nothing may read the caller's memory behind its back.
                with contextlib.suppress(PhregError):
                    self.cuda.call("cudaStreamSynchronize", handle)
                raise
        masks = [geometry.mask for geometry in geometries if geometry.mask is not None]
        return FittedFrames(images, np.stack(masks) if masks else None)

    def wait(self) -> None:
        """Wait for the frames that are read in the fitter's own stream."""
        with self.cuda.selected():
            self._start()[1].wait()

    def _start(self) -> tuple[ResampleKernel, Stream]:
        with self._lock:
            if self._kernel is None:
                self._kernel = ResampleKernel(self.cuda)
            if self._stream is None:
                self._stream = Stream(self.cuda)
            return self._kernel, self._stream

    def _order(self, frames: Sequence[DeviceFrame], handle: int) -> None:
        """Let the stream wait for those that fill the frames."""
        for filled in {stream for frame in frames for stream in frame.streams}:
            if stream_number(filled) != stream_number(handle):
                with Event(self.cuda, timing=False) as event:
                    event.order(filled, handle)

    def _queue(
        self,
        kernel: ResampleKernel,
        frames: Sequence[DeviceFrame],
        geometries: list[_Geometry],
        size: tuple[int, int],
        bgr: bool,
        handle: int,
    ) -> DeviceArray:
        before = {stream_number(handle)}
        images = self._pool.array((len(frames), *size, 3), np.dtype(np.uint8), before)
        for i, (frame, geometry) in enumerate(zip(frames, geometries)):
            middle = self._pool.array((*geometry.middle, 3), np.dtype(np.uint8), before)
            first, second = (Pass.from_buffer_copy(arguments) for arguments in geometry.passes)
            first.source, first.source_pitch, first.source_step = frame.pointer, frame.pitch, frame.step
            if frame.factors is not None:
                first.chroma, first.chroma_pitch, first.yuv = frame.chroma, frame.chroma_pitch, frame.factors
            first.target = second.source = middle.pointer
            second.target = images.pointer + i * size[0] * size[1] * 3
            second.swap = bgr and frame.factors is None
            kernel.launch(first, handle)
            kernel.launch(second, handle)
            middle.filled_on(handle)
            for table in geometry.tables:
                table.read_on(handle)
        images.filled_on(handle)
        return images

    def _make_geometry(
        self, width: int, height: int, size: tuple[int, int], preprocess: Preprocess, name: str | None
    ) -> _Geometry:
        inner, steps = fitted_steps((width, height), size, preprocess, name)
        new, (left, top, right, bottom) = placement((width, height), inner, steps)
        # A crop may reach beyond the image, which Pillow fills with black.
        x, y = (max(0, left), min(new[0], right)), (max(0, top), min(new[1], bottom))
        columns, rows = x[1] - x[0], y[1] - y[0]
        across = weight_table(width, new[0], *x, steps.interpolation)
        down = weight_table(height, new[1], *y, steps.interpolation)
        vertical = height_first((width, height), new)
        first_table, second_table = (down, across) if vertical else (across, down)
        # The pixels along the other axis that the second pass reads.
        low, high = int(second_table[0, 0]), int(second_table[0, -1] + second_table[1, -1])
        middle = (rows, high - low) if vertical else (high - low, columns)
        second_table = second_table - np.array([low] + [0] * (len(second_table) - 1))[:, None].astype(np.int32)
        tables = (self._upload(first_table), self._upload(second_table))
        first = Pass(
            along_x=not vertical,
            first=low,
            columns=middle[1],
            rows=middle[0],
            width=middle[1],
            height=middle[0],
            target_pitch=3 * middle[1],
            table=tables[0].pointer,
        )
        second = Pass(
            along_x=vertical,
            columns=size[1],
            rows=size[0],
            left=x[0] - left,
            top=y[0] - top,
            width=columns,
            height=rows,
            source_pitch=3 * middle[1],
            source_step=3,
            target_pitch=3 * size[1],
            table=tables[1].pointer,
        )
        mask = None
        if name == "pad":
            second.fill = tuple(int(value) for value in padding_colour(preprocess))
            grid = (size[0] // self.patch[0], size[1] // self.patch[1])
            mask = patch_mask(inner, grid, self.patch)
        return _Geometry((first, second), tables, middle, mask)

    def _upload(self, table: np.ndarray) -> DeviceArray:
        """Copy weights to the GPU, and wait, so that every stream may read them."""
        assert self._stream is not None
        handle, table = self._stream.handle, np.ascontiguousarray(table)
        array = self._pool.array(table.shape, table.dtype, {stream_number(handle)})
        self.cuda.copy(array.pointer, table.ctypes.data, table.nbytes, "HostToDevice", handle)
        self._stream.wait()
        array.filled_on(None)
        return array

    def close(self) -> None:
        """Wait, then free everything but images that are still held."""
        with self.cuda.selected():
            self._geometry.cache_clear()
            try:
                if self._stream is not None:
                    self.cuda.call("cudaDeviceSynchronize")
                    self._pool.close()
            finally:
                stream, self._stream = self._stream, None
                kernel, self._kernel = self._kernel, None
                for thing in (stream, kernel):
                    if thing is not None:
                        thing.close()
