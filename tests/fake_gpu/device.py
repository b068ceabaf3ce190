"""A GPU that records what is done with it, and arrays in its memory."""

import ctypes
import struct
import threading
import time
from collections import Counter

import numpy as np

from tests.fake_gpu.cuda import Runtime
from tests.fake_gpu.cuda_types import Handle, Mark, Refused, Stream, cudaError_t

assert struct.calcsize("P") == 8, "addresses of 64 bits"
# Fresh memory is full of this byte.
POISON = 0xA5


class Device:
    """The GPU. ``runtime`` is its ``cuda.bindings.runtime``; everything else is for tests.

    ``calls``: (name, arguments) of every call; ``undefined``: what a real GPU would not have survived, or answered with
    nonsense; ``installed``: GPUs that the driver lists; ``integrated``: as on a Jetson.
    """

    def __init__(self, name="NVIDIA Double", architecture=89, installed=1, integrated=False, driver=13000):
        self.name, self.architecture, self.installed = name, architecture, installed
        self.integrated, self.driver = integrated, driver
        self.memory, self.used = 8 << 30, 0
        self.lock = threading.RLock()
        self.calls, self.undefined = [], []
        self.device_memory, self.pinned = {}, {}  # address -> its bytes
        self.streams, self.events, self.graphs, self.programs = {0: Stream(), 1: Stream()}, {}, {}, {}
        self.streams[1] = self.streams[0]  # two numbers of the default stream
        self.chosen = threading.local()
        self.fault = None  # an error that every later call answers with
        self.planted = {}  # name of a call -> [calls until it fails, code]
        self.numbers = iter(range(0x1000, 1 << 40, 16))
        self.runtime = Runtime(self)

    def plant(self, call, at=1, code=cudaError_t.cudaErrorMemoryAllocation):
        """Let the ``at``-th call from now on fail once, e.g. ``plant("cudaMalloc", 3)``."""
        self.planted[call] = [at, code]

    def live(self):
        """What was made and not freed, by kind; empty where nothing is left."""
        left = {
            "allocations": len(self.device_memory), "pinned": len(self.pinned), "streams": len(self.streams) - 2,
            "events": len(self.events), "graphs": len(self.graphs) + len(self.programs),
        }  # fmt: skip
        return {kind: count for kind, count in left.items() if count}

    def count(self, call=None):
        """How often each call was made, or one."""
        counted = Counter(name for name, _ in self.calls)
        return counted if call is None else counted[call]

    def stream_of(self, handle):
        stream = self.streams.get(int(handle))
        if stream is None:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        return stream

    def span(self, pointer, size, pinned=False):
        """Live memory from ``pointer`` on as bytes; None where there is none, or not so much."""
        for start, buffer in (self.pinned if pinned else self.device_memory).items():
            if start <= pointer and pointer + size <= start + len(buffer):
                return memoryview(buffer).cast("B")[pointer - start : pointer - start + size]
        return None

    def queue(self, stream, work):
        """Put work into a stream, or into what the stream records."""
        if stream.recording is None:
            stream.queue.append(work)
            return
        if stream.thread != threading.get_ident():
            raise Refused(cudaError_t.cudaErrorStreamCaptureWrongThread)
        stream.recording.append(work)

    def drain(self, stream, until=None):
        """Do what is queued, all of it or up to a mark."""
        while stream.queue and (until is None or until.time is None):
            stream.queue.popleft()()
        if self.fault is not None:
            raise Refused(self.fault)

    def crash(self, why, code=cudaError_t.cudaErrorIllegalAddress):
        self.undefined.append(why)
        self.fault = code

    def unsafe(self):
        """Refuse what may not happen on a thread while one of its streams records, and spoil the recording."""
        mine = [s for s in self.streams.values() if s.recording is not None and s.thread == threading.get_ident()]
        for stream in mine:
            stream.broken = True
        if mine:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)

    def allocate(self, kind, size):
        self.unsafe()
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
        self.unsafe()
        if int(pointer) not in kind:
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        for stream in {id(s): s for s in self.streams.values()}.values():
            self.drain(stream)
        self.used -= len(kind.pop(int(pointer)))

    def new(self, kind, thing):
        number = next(self.numbers)
        kind[number] = thing
        return Handle(number)

    def take(self, kind, handle):
        try:
            return kind[int(handle)]
        except KeyError:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle) from None

    def finish(self, mark):
        if mark.time is None:
            self.drain(mark.stream, mark)

    def mark(self, stream):
        """A mark at a stream's end."""
        mark = Mark(stream)

        def pass_it():
            mark.time = time.perf_counter()

        self.queue(stream, pass_it)
        return mark


class Array:
    """Memory of a ``Device`` as other libraries show theirs: ``__cuda_array_interface__``.

    ``stream``: the stream that fills it. ``strides``: those that the interface reports.
    """

    def __init__(self, device, value, stream=None, strides=None):
        self.device, self.shape, self.dtype = device, value.shape, value.dtype
        self.pointer = device.allocate(device.device_memory, max(1, value.nbytes))
        self.write(value)
        self.stream, self.strides = stream, strides

    def write(self, value):
        self.device.span(self.pointer, value.nbytes)[:] = np.ascontiguousarray(value).tobytes()

    def read(self):
        """What is in the memory now, waiting for nothing."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        return np.frombuffer(bytes(self.device.span(self.pointer, size)), self.dtype).reshape(self.shape)

    def free(self):
        self.device.free(self.device.device_memory, self.pointer)

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.pointer, False), "strides": self.strides, "version": 3,
            "stream": self.stream,
        }  # fmt: skip
