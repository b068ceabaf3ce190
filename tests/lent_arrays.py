"""Arrays on the host that are lent as ``DeviceArray``, and a check of whether their memory was given back."""

import gc
import weakref

import numpy as np
import pytest

from phreg_deploy.runtime.gpu.arrays import CPU, DeviceArray

HOST = (CPU, 0)
every_dtype = pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64", "float16", "float32", "float64"])
every_shape = pytest.mark.parametrize("shape", [(1, 4, 4, 3), (5,), (), (2, 0, 3), (3, 1, 2)])


def consecutive(shape=(2, 3, 4), dtype="float32"):
    """Return the numbers from 0 on, which start again at 100."""
    return (np.arange(np.prod(shape, dtype=int)) % 100).reshape(shape).astype(dtype)


def lend(array, where=HOST):
    """Return a numpy array as a ``DeviceArray``, and a weak reference to the owner of its memory."""

    class Owner:
        def __init__(self):
            self.array = array

    owner = Owner()
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, owner, device=where), weakref.ref(owner)


def is_freed(reference):
    """Return whether nothing holds the memory any more."""
    gc.collect()
    return reference() is None
