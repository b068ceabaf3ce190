"""A fake GPU that records every call, and arrays in its memory."""

import ctypes
import struct
import threading
import time
from collections import Counter

import numpy as np

from tests.fake_gpu.cuda import Runtime
from tests.fake_gpu.cuda_types import Handle, Mark, Refused, Stream, cudaError_t

assert struct.calcsize("P") == 8, "addresses of 64 bits"
# Allocated memory is filled with this byte.
POISON = 0xA5


class Device:
    """The GPU. ``runtime`` is its ``cuda.bindings.runtime``; tests use everything else.

    ``calls``: (name, arguments) of every call; ``undefined``: descriptions of undefined behaviour, which would crash a
    real GPU or give wrong results; ``installed``: the number of GPUs that the driver lists; ``integrated``: whether the
    GPU shares the host's memory, as on a Jetson.
    """

    def __init__(self, name="NVIDIA Fake", architecture=89, installed=1, integrated=False, driver=13000):
        self.name, self.architecture, self.installed = name, architecture, installed
        self.integrated, self.driver = integrated, driver
        self.memory, self.used = 8 << 30, 0
        self.lock = threading.RLock()
        self.calls, self.undefined = [], []
        self.device_memory, self.pinned = {}, {}  # address -> its bytes
        self.streams, self.events, self.graphs, self.programs = {0: Stream(), 1: Stream()}, {}, {}, {}
        # 0 and 1 both mean the default stream.
        self.streams[1] = self.streams[0]
        self.chosen = threading.local()
        self.fault = None  # an error that every later call answers with
        self.failing = {}  # name of a call -> [calls until it fails, code]
        self.numbers = iter(range(0x1000, 1 << 40, 16))
        self.runtime = Runtime(self)

    def fail_call(self, call, at=1, code=cudaError_t.cudaErrorMemoryAllocation):
        """Let the ``at``-th call from now on fail once, e.g. ``fail_call("cudaMalloc", 3)``."""
        self.failing[call] = [at, code]

    def live(self):
        """Count the objects that were created and not freed, by kind; a kind without any is left out."""
        left = {
            "allocations": len(self.device_memory),
            "pinned": len(self.pinned),
            "streams": len(self.streams) - 2,
            "events": len(self.events),
            "graphs": len(self.graphs) + len(self.programs),
        }
        return {kind: count for kind, count in left.items() if count}

    def count(self, call=None):
        """Count the calls by name, or those of one name."""
        counted = Counter(name for name, _ in self.calls)
        return counted if call is None else counted[call]

    def stream_of(self, handle):
        stream = self.streams.get(int(handle))
        if stream is None:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        return stream

    def span(self, pointer, size, pinned=False):
        """Return ``size`` bytes of allocated memory from ``pointer`` on; None if they are not all allocated."""
        for start, buffer in (self.pinned if pinned else self.device_memory).items():
            if start <= pointer and pointer + size <= start + len(buffer):
                return memoryview(buffer).cast("B")[pointer - start : pointer - start + size]
        return None

    def queue(self, stream, work):
        """Queue work in a stream, or add it to the stream's recording."""
        if stream.recording is None:
            stream.queue.append(work)
            return
        if stream.thread != threading.get_ident():
            raise Refused(cudaError_t.cudaErrorStreamCaptureWrongThread)
        stream.recording.append(work)

    def drain(self, stream, until=None):
        """Run the work that is queued, all of it or up to a mark."""
        while stream.queue and (until is None or until.time is None):
            stream.queue.popleft()()
        if self.fault is not None:
            raise Refused(self.fault)

    def crash(self, why, code=cudaError_t.cudaErrorIllegalAddress):
        self.undefined.append(why)
        self.fault = code

    def refuse_while_recording(self):
        """Refuse a call that is not allowed while a stream of this thread records, and invalidate the recording."""
        mine = [s for s in self.streams.values() if s.recording is not None and s.thread == threading.get_ident()]
        for stream in mine:
            stream.broken = True
        if mine:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)

    def allocate(self, kind, size):
        self.refuse_while_recording()
        if size > self.memory - self.used:
            raise Refused(cudaError_t.cudaErrorMemoryAllocation)
        buffer = (ctypes.c_uint8 * (size + 256))()
        ctypes.memset(buffer, POISON, size + 256)
        address = ctypes.addressof(buffer)
        start = address + -address % 256  # as cudaMalloc does
        part = (ctypes.c_uint8 * size).from_buffer(buffer, start - address)
        kind[start] = part
        self.used += size
        return start

    def free(self, kind, pointer):
        self.refuse_while_recording()
        if int(pointer) not in kind:
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        for stream in {id(s): s for s in self.streams.values()}.values():
            self.drain(stream)
        self.used -= len(kind.pop(int(pointer)))

    def add(self, kind, thing):
        number = next(self.numbers)
        kind[number] = thing
        return Handle(number)

    def look_up(self, kind, handle):
        try:
            return kind[int(handle)]
        except KeyError:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle) from None

    def finish(self, mark):
        if mark.time is None:
            self.drain(mark.stream, mark)

    def mark(self, stream):
        """Queue a mark, which gets its time when the stream reaches it."""
        mark = Mark(stream)

        def set_time():
            mark.time = time.perf_counter()

        self.queue(stream, set_time)
        return mark


class Array:
    """An array of another library in a ``Device``'s memory, with ``__cuda_array_interface__``.

    ``stream``: the stream that fills the array. ``strides``: the strides that the interface reports.
    """

    def __init__(self, device, value, stream=None, strides=None):
        self.device, self.shape, self.dtype = device, value.shape, value.dtype
        self.pointer = device.allocate(device.device_memory, max(1, value.nbytes))
        self.write(value)
        self.stream, self.strides = stream, strides

    def write(self, value):
        self.device.span(self.pointer, value.nbytes)[:] = np.ascontiguousarray(value).tobytes()

    def read(self):
        """Return the present contents of the memory without a wait."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        return np.frombuffer(bytes(self.device.span(self.pointer, size)), self.dtype).reshape(self.shape)

    def free(self):
        self.device.free(self.device.device_memory, self.pointer)

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
