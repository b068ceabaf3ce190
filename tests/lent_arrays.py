"""Arrays on the host that are lent as ``DeviceArray``, and a check of whether their memory was given back."""

import gc
import weakref

import numpy as np

from phreg_deploy.runtime.gpu.arrays import CPU, DeviceArray

HOST = (CPU, 0)


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
