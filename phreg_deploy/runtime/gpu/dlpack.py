"""Write and read DLPack capsules without a copy; see include/dlpack/dlpack.h in github.com/dmlc/dlpack."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.images.intake import GPU

# kDLInt, kDLUInt, kDLFloat
CODES = {"i": 0, "u": 1, "f": 2}


@dataclass(frozen=True)
class Place:
    """Where an array lies. ``device``: (type, number). ``owner`` lives as long as the array. ``strides``: in bytes;
    None for a contiguous array."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: tuple[int, int]
    owner: Any
    strides: tuple[int, ...] | None = None

    def contiguous(self) -> Place:
        """The same place. Raises ``PhregError`` unless the array is contiguous."""
        check_contiguous(self.strides, self.shape, self.dtype.itemsize)
        return self


# DLPack 0.x, the default of every library.


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_api = ctypes.pythonapi
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
_NEW, _USED = b"dltensor", b"used_dltensor"


class _NumpyView:
    """Memory on a GPU under numpy's array interface; numpy reads no byte of it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.__array_interface__ = {
            "shape": place.shape,
            "typestr": place.dtype.str,
            "data": (place.pointer, False),
            "version": 3,
        }


def write_capsule(place: Place) -> Any:
    """Make numpy's capsule of the same memory, with the place's device written into it.

    numpy frees the capsule in C. A destructor in Python would lose an error that is being raised, e.g. if the
    reader refuses the device.
    """
    capsule = np.asarray(_NumpyView(place)).__dlpack__()
    tensor = ctypes.cast(_api.PyCapsule_GetPointer(capsule, _NEW), ctypes.POINTER(_Managed)).contents.tensor
    tensor.device_type, tensor.device_id = place.device
    return capsule


class _Borrowed:
    """A consumed capsule; the last reader's end calls the producer's deleter."""

    def __init__(self, capsule: Any, managed: Any) -> None:
        self.capsule, self.managed = capsule, managed

    def __del__(self) -> None:
        if self.managed.contents.deleter:
            self.managed.contents.deleter(self.managed)


def read_capsule(capsule: Any, expected: tuple[int, ...]) -> Place:
    """Consume a capsule.

    Raises:
        PhregError: the array is on another kind of device than ``expected``, or has a type that numpy does not know.
    """
    managed = ctypes.cast(_api.PyCapsule_GetPointer(capsule, _NEW), ctypes.POINTER(_Managed))
    tensor = managed.contents.tensor
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    kinds = {code: kind for kind, code in CODES.items()}
    if tensor.device_type not in expected:
        raise PhregError(f"device array: got DLPack device type {tensor.device_type}, expected {GPU} (CUDA).")
    if tensor.lanes != 1 or tensor.code not in kinds:
        raise PhregError(
            f"device array: got DLPack type code {tensor.code} with {tensor.bits} bits, expected integers or floats "
            "that numpy knows."
        )
    dtype = np.dtype(f"{kinds[tensor.code]}{tensor.bits // 8}")
    strides = None if not tensor.strides else tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim))
    _api.PyCapsule_SetName(capsule, _USED)
    device = (int(tensor.device_type), int(tensor.device_id))
    pointer = int(tensor.data or 0) + int(tensor.byte_offset)
    return Place(pointer, shape, dtype, device, _Borrowed(capsule, managed), strides)


def check_contiguous(strides: tuple[int, ...] | None, shape: tuple[int, ...], itemsize: int) -> None:
    """Raise ``PhregError`` unless strides, in bytes, are those of a contiguous array."""
    if strides is None or 0 in shape:
        return
    step = itemsize
    for side, stride in zip(reversed(shape), reversed(tuple(strides))):
        if side != 1 and stride != step:
            raise PhregError(
                f"device array: got strides {strides} for shape {shape}, expected a contiguous array; make it one "
                "first."
            )
        step *= side
