"""Share arrays on a GPU between libraries without a copy, by ``__cuda_array_interface__`` and DLPack."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.images.intake import CPU, MANAGED, on_gpu
from phreg_deploy.images.intake import GPU as GPU
from phreg_deploy.runtime.gpu.cuda import Cuda, Event
from phreg_deploy.runtime.gpu.dlpack import Place, read_capsule, write_capsule
from phreg_deploy.runtime.gpu.memory import DeviceBuffer


def stream_number(handle: int) -> int:
    """Return one number for each stream: 0 and 1 (``cudaStreamLegacy``) are both the default stream."""
    return handle or 1


class Owner:
    """Whoever owns the memory of an array, and wants to know who uses it."""

    def filled(self, stream: int | None) -> None:
        """Note that work in ``stream`` fills the memory after all earlier use of it; None if that is done."""

    def lend(self, stream: int | None) -> None:
        """Note that work in ``stream`` reads the memory; None for a stream that is not known."""


class DeviceArray:
    """A contiguous array in device memory.

    ``pointer``: its address. ``dtype``: numpy's. ``stream``: the stream that fills it; readers wait for it.
    ``owner`` lives as long as the array.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        owner: Any = None,
        stream: int | None = None,
        device: tuple[int, int] = (GPU, 0),
        cuda: Cuda | None = None,
    ) -> None:
        self.pointer, self.shape, self.dtype = pointer, tuple(shape), np.dtype(dtype)
        self.stream, self.device = stream, device
        self._owner, self._cuda = owner, cuda

    @classmethod
    def allocate(
        cls, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any], stream: int | None = None
    ) -> DeviceArray:
        """Allocate device memory; it is freed with the last reference."""
        buffer = _Owned(cuda, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return cls(buffer.pointer, shape, dtype, buffer, stream, (GPU, cuda.index), cuda)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device[0] == CPU:
            raise AttributeError("__cuda_array_interface__")
        self.read_on(None)
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
            # The protocol's number of the default stream is 1.
            "stream": None if self.stream is None else stream_number(self.stream),
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """A capsule for a reader on ``stream``, which waits for the work that fills the array; the host does not.

        As DLPack says, None means the default stream, and -1 that the reader takes care of the order itself.
        """
        if self.device[0] != CPU:
            reader = None if stream == -1 else stream_number(stream or 1)
            if self.stream is not None and reader not in (None, stream_number(self.stream)):
                driver = self._driver()
                with driver.selected(), Event(driver, timing=False) as event:
                    event.order(self.stream, reader)
            self.read_on(reader)
        return write_capsule(Place(self.pointer, self.shape, self.dtype, self.device, self))

    def filled_on(self, stream: int | None, given: bool = False) -> None:
        """Note the stream in which the array is filled; None if it is filled already.

        ``given``: a caller gave the array, so other streams than those of the call may still read it.
        """
        self.stream = stream
        if isinstance(self._owner, Owner) and not given:
            self._owner.filled(stream)
        elif stream is not None:
            self.read_on(stream)

    def read_on(self, stream: int | None) -> None:
        """Note that work in ``stream`` reads the array; None for a stream that is not known."""
        if isinstance(self._owner, Owner):
            self._owner.lend(stream)

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        host = np.empty(self.shape, self.dtype)
        if self.device[0] == CPU:
            ctypes.memmove(host.ctypes.data, self.pointer, self.nbytes)
            return host
        cuda, handle = self._driver(), self.stream or 0
        with cuda.selected():
            cuda.copy(host.ctypes.data, self.pointer, self.nbytes, "DeviceToHost", handle)
            cuda.call("cudaStreamSynchronize", handle)
        return host

    def _driver(self) -> Cuda:
        """The device of the memory, also if another library allocated it."""
        if self._cuda is None:
            self._cuda = Cuda(self.device[1])
        return self._cuda


class _Owned(DeviceBuffer):
    """Device memory that is freed with its last reader."""

    def __del__(self) -> None:
        # The interpreter or the driver may be shutting down, which frees the memory.
        with contextlib.suppress(Exception):
            self.close()


def as_device(value: Any, stream: int | None = None) -> DeviceArray:
    """View an array of another library without a copy.

    Args:
        stream: the stream that will read it; the other library lets it wait for its own pending work.

    Raises:
        PhregError: the array is not on a GPU, or not contiguous.
    """
    if isinstance(value, DeviceArray):
        return value
    place, filled = place_of(value, stream)
    place.contiguous()
    return DeviceArray(place.pointer, place.shape, place.dtype, place.owner, filled, place.device)


def place_of(value: Any, stream: int | None = None) -> tuple[Place, int | None]:
    """Where an array of any library lies, with any strides, and the stream in which it is filled, or None.

    Args:
        stream: as of ``as_device``.

    Raises:
        PhregError: the array is not on a GPU.
    """
    if isinstance(value, DeviceArray):
        return Place(value.pointer, value.shape, value.dtype, value.device, value), value.stream
    if not on_gpu(value):
        raise PhregError(
            f"device array: got {type(value).__name__}, expected an array on a GPU with __cuda_array_interface__ or "
            "__dlpack__."
        )
    # DLPack first: it orders the streams, and torch's array interface names no stream.
    if hasattr(value, "__dlpack__"):
        # DLPack forbids 0.
        reader = stream or 1
        try:
            capsule = value.__dlpack__(stream=reader)
        except (BufferError, TypeError, RuntimeError, ValueError) as error:
            raise PhregError(f"device array: {type(value).__name__} cannot be read: {error}.") from None
        return read_capsule(capsule, (GPU, MANAGED)), reader
    facts = value.__cuda_array_interface__
    dtype, shape = np.dtype(facts["typestr"]), tuple(facts["shape"])
    strides = facts.get("strides")
    place = Place(int(facts["data"][0]), shape, dtype, (GPU, 0), value, None if strides is None else tuple(strides))
    return place, facts.get("stream")


def from_capsule(capsule: Any, expected: tuple[int, ...] = (GPU, MANAGED)) -> DeviceArray:
    """Consume a DLPack capsule as an array; raises as ``read_capsule``, and for one that is not contiguous."""
    place = read_capsule(capsule, expected).contiguous()
    return DeviceArray(place.pointer, place.shape, place.dtype, place.owner, None, place.device)
