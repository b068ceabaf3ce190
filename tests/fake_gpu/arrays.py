"""Arrays of another library in the fake GPU's memory."""

import numpy as np


class Array:
    """An array in a ``Device``'s memory, with ``__cuda_array_interface__``.

    ``stream``: the stream that fills the array. ``strides``: the strides that the interface reports. ``offset``: bytes
    between an aligned address and the array, as ``batch[i:i + 1]`` has for most i.
    """

    def __init__(self, device, value, stream=None, strides=None, offset=0, index=0):
        self.device, self.shape, self.dtype = device, value.shape, value.dtype
        self._start = device.memory.allocate(max(1, value.nbytes) + offset, index)
        self.pointer = self._start + offset
        self.write(value)
        self.stream, self.strides = stream, strides

    def write(self, value):
        self.device.span(self.pointer, value.nbytes)[:] = np.ascontiguousarray(value).tobytes()

    def read(self):
        """Return the present contents of the memory without a wait."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        return np.frombuffer(bytes(self.device.span(self.pointer, size)), self.dtype).reshape(self.shape)

    def free(self):
        self.device.free(self._start)

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": self.strides,
            "version": 3,
            "stream": self.stream,
        }
