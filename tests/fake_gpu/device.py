"""Fake GPUs that record every call, and run queued work only when somebody waits for it."""

import threading
import time
from collections import Counter

from tests.fake_gpu.cuda import Driver, Runtime
from tests.fake_gpu.cuda_types import Handle, Mark, Refused, Stream, Work, cudaError_t
from tests.fake_gpu.memory import Memory

# cudaStreamPerThread
PER_THREAD = 2


class Device:
    """One or several GPUs of a kind. ``runtime`` is their ``cuda.bindings.runtime``; tests use everything else.

    ``calls``: (name, arguments) of every call. ``waits``: the names of those at which the host waited or may have
    waited. ``undefined``: descriptions of undefined behaviour, which would crash a real GPU or give wrong results.
    ``installed``: the number of GPUs that the driver lists. ``integrated``: whether they share the host's memory, as on
    a Jetson. ``started``: the GPUs that have a context.
    """

    def __init__(self, name="NVIDIA Fake", architecture=89, installed=1, integrated=False, driver=13000):
        self.name, self.architecture, self.installed = name, architecture, installed
        self.integrated, self.driver, self.multiprocessors = integrated, driver, 16
        self.memory = Memory(8 << 30, integrated)
        self.lock = threading.RLock()
        self.calls, self.waits, self.undefined = [], [], []
        self.streams, self.events, self.graphs, self.programs = {}, {}, {}, {}
        self.modules, self.functions = {}, {}
        self._defaults, self._per_thread = {}, {}  # GPU -> its default stream; (GPU, thread) -> its own
        self.chosen, self.started = threading.local(), set()
        self.fault = None  # an error that every later call answers with
        self.failing = {}  # name of a call -> [calls until it fails, code]
        self.numbers = iter(range(0x1000, 1 << 40, 16))
        self.runtime, self.driver_api = Runtime(self), Driver(self)

    def fail_call(self, call, at=1, code=cudaError_t.cudaErrorMemoryAllocation):
        """Let the ``at``-th call from now on fail once, e.g. ``fail_call("cudaMalloc", 3)``."""
        self.failing[call] = [at, code]

    def live(self):
        """Count the objects that were created and not freed, by kind; a kind without any is left out."""
        left = {
            "allocations": self.memory.count(pinned=False),
            "pinned": self.memory.count(pinned=True),
            "streams": len(self.streams),
            "events": len(self.events),
            "graphs": len(self.graphs) + len(self.programs),
            "modules": len(self.modules),
        }
        return {kind: count for kind, count in left.items() if count}

    def count(self, call=None):
        """Count the calls by name, or those of one name."""
        counted = Counter(name for name, _ in self.calls)
        return counted if call is None else counted[call]

    @property
    def index(self):
        """The GPU of the calling thread, 0 until it sets another."""
        return getattr(self.chosen, "index", 0)

    def stream_of(self, handle):
        """Return a stream; 0 and 1 are the default stream of the thread's GPU, 2 the default stream of the thread."""
        if int(handle) in (0, 1):
            return self._defaults.setdefault(self.index, Stream(self.index, blocking=True))
        if int(handle) == PER_THREAD:
            own = (self.index, threading.get_ident())
            return self._per_thread.setdefault(own, Stream(self.index, blocking=True))
        stream = self.streams.get(int(handle))
        if stream is None:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        return stream

    def is_default(self, stream):
        return stream in self._defaults.values()

    def every_stream(self):
        return [*self.streams.values(), *self._defaults.values(), *self._per_thread.values()]

    def span(self, pointer, size, pinned=False):
        """Return ``size`` bytes of allocated memory from ``pointer`` on; None if they are not all allocated."""
        region = self.memory.find(pointer, size, pinned)
        if region is None:
            return None
        return memoryview(region.part).cast("B")[pointer - region.start : pointer - region.start + size]

    def queue(self, stream, work):
        """Queue work (a function or ``Work``) in a stream, or add it to the stream's recording."""
        work = work if isinstance(work, Work) else Work(work)
        if stream.recording is None:
            self.follow_default(stream)
            number = None if work.owner is None else work.owner.next_number()
            stream.queue.append((work, number))
            return
        if stream.thread != threading.get_ident():
            raise Refused(cudaError_t.cudaErrorStreamCaptureWrongThread)
        stream.recording.append(work)

    def follow_default(self, stream):
        """Order new work of a stream after the default stream's, and the default stream's after all blocking streams'.

        "Implicit Synchronization" in the CUDA C++ Programming Guide; a stream of cudaStreamNonBlocking is left out.
        """
        if not stream.blocking:
            return
        others = [s for s in self.every_stream() if s.blocking and s.index == stream.index and s is not stream]
        if not self.is_default(stream):
            others = [s for s in others if self.is_default(s)]
        for other in others:
            if other.recording is not None:
                other.broken = True
                raise Refused(cudaError_t.cudaErrorStreamCaptureImplicit)
            if other.queue:
                mark = Mark(other)
                other.queue.append((Work(lambda mark=mark: self._reach(mark)), None))
                stream.queue.append((Work(lambda mark=mark: self.finish(mark)), None))

    def drain(self, stream, until=None):
        """Run the work that is queued, all of it or up to a mark."""
        while stream.queue and (until is None or until.time is None):
            work, number = stream.queue.popleft()
            if work.owner is None:
                work.run()
            else:
                work.run(number)
        if self.fault is not None:
            raise Refused(self.fault)

    def synchronise(self):
        """Wait for the whole GPU, which is refused while any of its streams records, and ends that recording.

        "Prohibited and Unhandled Operations" under CUDA Graphs in the CUDA C++ Programming Guide: "it is also invalid
        to query the execution status of or synchronize a broader handle which encompasses an active stream capture".
        """
        mine = [stream for stream in self.every_stream() if stream.index == self.index]
        recording = [stream for stream in mine if stream.recording is not None]
        for stream in recording:
            stream.broken = True
        if recording:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
        self.waits.append("cudaDeviceSynchronize")
        for stream in mine:
            self.drain(stream)

    def in_flight(self, uses):
        """Return whether any queued work fulfils ``uses``, a function of ``Work``."""
        return any(uses(work) for stream in self.every_stream() for work, _ in stream.queue)

    def refuse_while_recording(self):
        """Refuse a call that is not allowed while a stream of this thread records, and invalidate the recording."""
        me = threading.get_ident()
        mine = [s for s in self.every_stream() if s.recording is not None and s.thread == me]
        for stream in mine:
            stream.broken = True
        if mine:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)

    def allocate(self, size, pinned=False):
        self.refuse_while_recording()
        return self.memory.allocate(size, self.index, pinned)

    def free(self, pointer, pinned=False):
        self.refuse_while_recording()
        region = self.memory.free(pointer, pinned)
        start, end = region.start, region.start + len(region.part)
        if self.in_flight(lambda work: any(at < end and start < at + size for at, size in work.touches)):
            # cudaFree "may perform implicit synchronization", so nothing may rely on it.
            self.undefined.append("memory was freed while queued work uses it")

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
        self.queue(stream, lambda: self._reach(mark))
        return mark

    def _reach(self, mark):
        mark.time = time.perf_counter()

    def crash(self, why, code=cudaError_t.cudaErrorIllegalAddress):
        """Record undefined behaviour; every later call fails, as after a sticky error of CUDA."""
        self.undefined.append(why)
        self.fault = code
