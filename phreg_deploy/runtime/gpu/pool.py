"""Device memory for outputs that is used again, because cudaMalloc and cudaFree may wait for the whole GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.images.intake import GPU
from phreg_deploy.runtime.gpu.arrays import DeviceArray, Owner, stream_number
from phreg_deploy.runtime.gpu.closing import Closing, close_all
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu.memory import DeviceBuffer

# Bytes that the pool keeps at most without a use.
MOST_IDLE = 256 << 20


class OutputPool(Closing):
    """Arrays whose memory comes back with their last reader. Several threads may use one pool.

    A block is used again by a call that waits for every stream in which it was filled or read. These are streams that
    the caller of that call named, so no stream is touched that may be destroyed by then. A block that was lent through
    ``__cuda_array_interface__``, whose reader names no stream, is freed instead.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.closed = cuda, False
        # Blocks of arrays that are gone. Only this is touched in ``__del__``, which may run inside any other call.
        self._returned: SimpleQueue[_Block] = SimpleQueue()
        self._idle: list[_Block] = []
        # An array may be collected, and give its memory back, inside any call of this pool.
        self._lock = threading.RLock()

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], before: Collection[int]) -> DeviceArray:
        """An array for a call whose work waits for the streams ``before``."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self._lock:
            self._collect()
            block = next((b for b in self._idle if b.buffer.size == size and b.streams <= set(before)), None)
            if block is not None:
                self._idle.remove(block)
            else:
                block = _Block(self._allocate(size))
        device = (GPU, self.cuda.index)
        return DeviceArray(block.buffer.pointer, shape, dtype, _Lease(self, block), None, device, self.cuda)

    def give_back(self, block: _Block) -> None:
        """Take the memory of an array that is gone; calls nothing of CUDA unless the pool is closed."""
        self._returned.put(block)
        if self.closed:
            # The interpreter or the driver may be shutting down, which frees the memory.
            with contextlib.suppress(Exception):
                self.close()

    def _allocate(self, size: int) -> DeviceBuffer:
        if sum(block.buffer.size for block in self._idle) + size > MOST_IDLE:
            self._free_idle()
        try:
            return DeviceBuffer(self.cuda, size)
        except PhregError:
            if not self._idle:
                raise
            self._free_idle()
            return DeviceBuffer(self.cuda, size)

    def _collect(self) -> None:
        """Sort the blocks that came back."""
        lost: list[_Block] = []
        with contextlib.suppress(Empty):
            while True:
                block = self._returned.get_nowait()
                (lost if block.unknown else self._idle).append(block)
        self._free(lost)

    def _free_idle(self) -> None:
        blocks, self._idle = self._idle, []
        self._free(blocks)

    def _free(self, blocks: list[_Block]) -> None:
        """Free memory that other streams may still read; free all of it, then raise the first error."""
        try:
            if any(block.streams or block.unknown for block in blocks):
                self.cuda.call("cudaDeviceSynchronize")
        finally:
            close_all(block.buffer for block in blocks)

    def close(self) -> None:
        """Free what is idle; arrays that live on free theirs themselves."""
        self.closed = True
        with self._lock:
            blocks, self._idle = self._idle, []
            with contextlib.suppress(Empty):
                while True:
                    blocks.append(self._returned.get_nowait())
            if blocks:
                with self.cuda.selected():
                    self._free(blocks)


class _Block:
    """Memory of the pool. ``streams``: those in which it was filled or read. ``unknown``: and others."""

    def __init__(self, buffer: DeviceBuffer) -> None:
        self.buffer, self.streams, self.unknown = buffer, set[int](), False


class _Lease(Owner):
    """The owner of an array's memory; gives it back to the pool."""

    def __init__(self, pool: OutputPool, block: _Block) -> None:
        self._pool, self._block = pool, block

    def filled(self, stream: int | None) -> None:
        # What read the block before is done by then.
        self._block.streams = set() if stream is None else {stream_number(stream)}

    def lend(self, stream: int | None) -> None:
        if stream is None:
            self._block.unknown = True
        else:
            self._block.streams.add(stream_number(stream))

    def __del__(self) -> None:
        self._pool.give_back(self._block)
