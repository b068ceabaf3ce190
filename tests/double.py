"""A GPU and a TensorRT that are not there: what this project calls of both, recorded, with the refusals that the real ones have.

Work is queued as on a real device and only done when somebody waits for it, so that a wait that was forgotten shows in the
answers. The engine really computes, on the processor, with ONNX Runtime. A public name that NVIDIA does not have would be a
defect of the double, and ``test_tensorrt_runtime.py`` looks for them; what tests turn and read has names of our own in
``Device`` and ``Workshop``.
"""

import contextlib
import ctypes
import enum
import functools
import hashlib
import importlib.machinery
import json
import re
import struct
import threading
import time
import types
from collections import Counter, deque
from pathlib import Path

import numpy as np

POISON = 0xA5  # what fresh memory is full of


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureUnmatched = 903
    cudaErrorStreamCaptureIsolation = 905
    cudaErrorStreamCaptureWrongThread = 908


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class Refused(Exception):
    """What a call answers with instead of a result."""

    def __init__(self, code):
        super().__init__(code.name)
        self.code = code


class Handle:
    """A ``cudaStream_t`` and the like: no number, but it has one."""

    def __init__(self, number):
        self.number = number

    def __int__(self):
        return self.number


class Mark:
    """A place in a stream; ``time`` is there once the stream has reached it."""

    def __init__(self, stream):
        self.stream, self.time = stream, None


class Stream:
    def __init__(self):
        self.queue, self.recording, self.thread, self.broken = deque(), None, None, False


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


def _call(function):
    """A call of the runtime: noted, refused where a test planted it, and answered as cuda-python answers."""

    @functools.wraps(function)
    def call(self, *arguments):
        device = self._device
        with device.lock:
            device.calls.append((function.__name__, arguments))
            planted = device.planted.get(function.__name__)
            try:
                if device.fault is not None:
                    raise Refused(device.fault)
                if planted is not None:
                    planted[0] -= 1
                    if planted[0] == 0:
                        del device.planted[function.__name__]
                        if function.__name__ == "cudaStreamEndCapture":  # is over even so
                            device.stream_of(arguments[0]).recording = None
                        raise Refused(planted[1])
                result = function(device, *arguments)
            except Refused as refused:
                return (refused.code, None)
            return (cudaError_t.cudaSuccess,) if result is None else (cudaError_t.cudaSuccess, *result)

    return call


class Runtime:
    """``cuda.bindings.runtime``: every call returns ``(status, *results)``."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, device):
        self._device = device

    @_call
    def cudaGetDeviceCount(device):
        if not device.installed:
            raise Refused(cudaError_t.cudaErrorNoDevice)
        return (device.installed,)

    @_call
    def cudaSetDevice(device, index):
        if not 0 <= index < device.installed:
            raise Refused(cudaError_t.cudaErrorInvalidDevice)
        device.chosen.index = index

    @_call
    def cudaGetDeviceProperties(device, index):
        return (
            types.SimpleNamespace(
                name=device.name.encode().ljust(256, b"\0"), major=device.architecture // 10, minor=device.architecture % 10,
                totalGlobalMem=device.memory, multiProcessorCount=16, integrated=int(device.integrated),
            ),
        )  # fmt: skip

    @_call
    def cudaDriverGetVersion(device):
        return (device.driver,)

    @_call
    def cudaMemGetInfo(device):
        return device.memory - device.used, device.memory

    @_call
    def cudaMalloc(device, size):
        return (device.allocate(device.device_memory, size),)

    @_call
    def cudaFree(device, pointer):
        device.free(device.device_memory, pointer)

    @_call
    def cudaMallocHost(device, size):
        return (device.allocate(device.pinned, size),)

    @_call
    def cudaFreeHost(device, pointer):
        device.free(device.pinned, pointer)

    @_call
    def cudaMemcpyAsync(device, target, source, size, kind, handle):
        stream, kind = device.stream_of(handle), cudaMemcpyKind(kind)
        ends = {
            "target": (target, kind.name.endswith("ToDevice")),
            "source": (source, kind.name.startswith("cudaMemcpyDevice")),
        }
        pageable = any(not on and device.span(at, size, pinned=True) is None for at, on in ends.values())
        if any(on and device.span(at, size) is None for at, on in ends.values()):
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        if pageable:  # is copied before the call returns, which a recording cannot
            if stream.recording is not None:
                stream.broken = True
                raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
            device.drain(stream)
            ctypes.memmove(target, source, size)
            return

        def copy():
            if all(device.span(at, size, pinned=not on) is not None for at, on in ends.values()):
                ctypes.memmove(target, source, size)
            else:
                device.crash(f"a copy of {size} bytes reached memory that was freed")

        device.queue(stream, copy)

    @_call
    def cudaStreamCreateWithFlags(device, flags):
        assert flags == 1, "a stream that waits for the default one"
        return (device.new(device.streams, Stream()),)

    @_call
    def cudaStreamDestroy(device, handle):
        stream = device.stream_of(handle)
        if int(handle) in (0, 1) or stream.recording is not None:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        device.drain(stream)
        del device.streams[int(handle)]

    @_call
    def cudaStreamSynchronize(device, handle):
        stream = device.stream_of(handle)
        if stream.recording is not None:
            stream.broken = True
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
        device.drain(stream)

    @_call
    def cudaStreamWaitEvent(device, handle, event, flags):
        stream, mark = device.stream_of(handle), device.take(device.events, event)[0]
        if stream.recording is not None:
            stream.broken = True
            raise Refused(cudaError_t.cudaErrorStreamCaptureIsolation)
        if mark is not None:
            device.queue(stream, lambda: device.finish(mark))

    @_call
    def cudaStreamBeginCapture(device, handle, mode):
        stream = device.stream_of(handle)
        if stream is device.streams[0]:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
        if stream.recording is not None:
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        assert mode == cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal, "others would disturb other threads"
        stream.recording, stream.thread, stream.broken = [], threading.get_ident(), False

    @_call
    def cudaStreamEndCapture(device, handle):
        stream = device.stream_of(handle)
        if stream.recording is None:
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        if stream.thread != threading.get_ident():
            raise Refused(cudaError_t.cudaErrorStreamCaptureWrongThread)
        recorded, stream.recording = stream.recording, None
        if stream.broken:
            raise Refused(cudaError_t.cudaErrorStreamCaptureInvalidated)
        return (device.new(device.graphs, recorded),)

    @_call
    def cudaGraphInstantiate(device, graph, flags):
        return (device.new(device.programs, list(device.take(device.graphs, graph))),)

    @_call
    def cudaGraphDestroy(device, graph):
        device.take(device.graphs, graph)
        del device.graphs[int(graph)]

    @_call
    def cudaGraphLaunch(device, program, handle):
        stream = device.stream_of(handle)
        for work in device.take(device.programs, program):
            device.queue(stream, work)

    @_call
    def cudaGraphExecDestroy(device, program):
        device.take(device.programs, program)
        del device.programs[int(program)]

    @_call
    def cudaEventCreate(device):
        return (device.new(device.events, [None]),)

    @_call
    def cudaEventRecord(device, event, handle):
        stream = device.stream_of(handle)
        device.take(device.events, event)[0] = device.mark(stream)

    @_call
    def cudaEventSynchronize(device, event):
        mark = device.take(device.events, event)[0]
        if mark is not None:
            device.finish(mark)

    @_call
    def cudaEventElapsedTime(device, start, end):
        marks = [device.take(device.events, event)[0] for event in (start, end)]
        if None in marks:
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        if any(mark.time is None for mark in marks):
            raise Refused(cudaError_t.cudaErrorNotReady)
        return (1e3 * (marks[1].time - marks[0].time),)

    @_call
    def cudaEventDestroy(device, event):
        device.take(device.events, event)
        del device.events[int(event)]


# What an ONNX file holds, read without the package onnx, which `build` must do without


def _fields(data):
    """(number, value) of one protobuf message; parts as memoryviews, so that they can be written."""
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        tag = number()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, number()
        else:
            size = number() if kind == 2 else {1: 8, 5: 4}[kind]
            yield tag >> 3, data[at : at + size]
            at += size


def _texts(message, wanted):
    return [bytes(value).decode() for key, value in _fields(message) if key == wanted]


def read_nodes(data):
    """Nodes of an ONNX file in order: (name, operator, inputs)."""
    graph = next(value for key, value in _fields(memoryview(data)) if key == 7)
    nodes = [value for key, value in _fields(graph) if key == 1]
    return [((_texts(n, 3) or [""])[0], _texts(n, 4)[0], _texts(n, 1)) for n in nodes]


def weight_types(data):
    """Weight -> its ONNX type number."""
    graph = next(value for key, value in _fields(memoryview(data)) if key == 7)
    tensors = [list(_fields(value)) for key, value in _fields(graph) if key == 5]
    facts = [{key: value for key, value in tensor if key in (2, 8)} for tensor in tensors]
    return {bytes(fact[8]).decode(): fact[2] for fact in facts}


def spoiled(data, name):
    """The file with every weight whose name starts with ``name`` scaled to nothing; there must be one."""
    changed = bytearray(data)
    graph = next(value for key, value in _fields(memoryview(changed)) if key == 7)
    found = 0
    for key, tensor in _fields(graph):
        if key == 5 and _texts(tensor, 8)[0].startswith(name):
            raw = next(value for number, value in _fields(tensor) if number == 9)
            raw[:] = bytes(len(raw))
            found += 1
    assert found, f"no weight is called {name}"
    return bytes(changed)


class Workshop:
    """TensorRT's surroundings, for tests to turn.

    ``unfused``: blocks whose attention stays in pieces; ``floats``: linear layers that lose their 8 bits; ``spoiled``: start
    of the name of weights that every engine gets wrong; ``refused``: a node that the parser does not take; ``fail_enqueue``:
    which one from now on fails; ``contexts``: how many can be made; ``steps``: of a build; ``on_step``: called in each;
    ``dawdle``: seconds that a context is held by its caller; ``builds``: what each build was asked for.
    """

    def __init__(self, device, version="10.16.1"):
        self.device, self.version = device, version
        self.unfused, self.floats = set(), set()
        self.spoiled = self.refused = self.fail_enqueue = self.contexts = self.on_step = None
        self.starts, self.steps, self.dawdle, self.builds, self.uploads = True, 5, 0.0, [], []
        self.runs = 0  # inferences that were really computed
        self.tensorrt = make_tensorrt(self)

    def enqueue_fails(self):
        if self.fail_enqueue is None:
            return False
        self.fail_enqueue -= 1
        if self.fail_enqueue:
            return False
        self.fail_enqueue = None
        return True


KINDS = {
    "tensor(uint8)": "UINT8", "tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(int32)": "INT32",
}  # fmt: skip
NUMPY = {"UINT8": np.uint8, "FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}
ATTENTION = re.compile(r"^(blocks\.(\d+)\.attn)/(MatMul|Softmax)")
MAGIC = b"double of a plan\n"


def make_layers(graph, workshop):
    """The inspector's list for an ONNX file: one kernel per attention in 16 bits, one product per linear layer."""
    nodes, types_ = read_nodes(graph), weight_types(graph)
    half = any(kind in (10, 16) for kind in types_.values())
    layers, attentions = [], {}
    names = {name for name, _, _ in nodes}

    def layer(kind, label, members, datatype="Half"):
        layers.append({
            "Name": f"{label}_myl0_{len(layers)}", "LayerType": kind, "TacticName": label,
            "Inputs": [{"Name": "x", "Dimensions": [1, 8, 8], "Format/Datatype": datatype}],
            "Outputs": [{"Name": "y", "Dimensions": [1, 8, 8], "Format/Datatype": "Half" if half else "Float"}],
            "Metadata": "\x1e".join(f"[ONNX Layer: {name}]" for name in members),
        })  # fmt: skip

    for name, operator, _ in nodes:
        found = ATTENTION.match(name)
        if found:
            attentions.setdefault((found[1], int(found[2])), []).append(name)
        elif operator == "MatMul":
            linear = name.rpartition("/")[0]
            weight = f"{linear}/weight/DequantizeLinear"
            eight = weight in names and linear not in workshop.floats
            kind = (
                ("FP8" if any(t == 17 for t in types_.values()) else "Int8") if eight else ("Half" if half else "Float")
            )
            layer("gemm", "sm80_xmma_gemm", [name, weight] if weight in names else [name], f"Row major linear {kind}")
        else:
            layer("kgen", f"__myl_{operator}", [name])
    for (_, block), members in attentions.items():
        if half and block not in workshop.unfused:
            layer("kgen", "_gemm_mha_v2", members)
        else:
            for member in members:
                layer("kgen", "__myl_MaxSubExpSumDivMul" if "Softmax" in member else "__myl_Fc", [member])
    return layers


def make_tensorrt(workshop):
    """The module ``tensorrt``, as far as it is called."""
    device = workshop.device
    trt = types.ModuleType("tensorrt")
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)

    def public(thing):
        setattr(trt, thing.__name__, thing)
        return thing

    def numbered(name, **values):
        return public(enum.IntEnum(name, values))

    def ready(thing, kind):
        assert isinstance(thing, kind), f"{thing} is no {kind.__name__}"
        assert getattr(thing, "_made", False), f"{type(thing).__name__} never called {kind.__name__}.__init__"

    trt.__version__ = workshop.version
    numbered("TensorIOMode", NONE=0, INPUT=1, OUTPUT=2)
    numbered("LayerInformationFormat", ONELINE=0, JSON=1)
    numbered("ProfilingVerbosity", LAYER_NAMES_ONLY=0, NONE=1, DETAILED=2)
    numbered("MemoryPoolType", WORKSPACE=0)
    numbered("BuilderFlag", TF32=7, VERSION_COMPATIBLE=14)
    newer = {} if workshop.version.startswith("10.3") else {"SAME_COMPUTE_CAPABILITY": 2}
    numbered("HardwareCompatibilityLevel", NONE=0, AMPERE_PLUS=1, **newer)
    numbered("NetworkDefinitionCreationFlag", STRONGLY_TYPED=1)
    numbered("DataType", FLOAT=0, HALF=1, INT32=3, UINT8=5, INT64=8)

    @public
    def nptype(trt_type):
        return NUMPY[trt_type.name]

    class _Made:
        def __init__(self):
            self._made = True

    @public
    class ILogger(_Made):
        Severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

        def log(self, severity, msg):
            raise NotImplementedError

    @public
    class IProgressMonitor(_Made):
        pass

    @public
    class IProfiler(_Made):
        pass

    @public
    class IHostMemory:
        def __init__(self, data):
            self._data = data

        def __buffer__(self, flags):  # Python 3.12
            return memoryview(self._data)

        def __bytes__(self):
            return self._data

        @property
        def nbytes(self):
            return len(self._data)

    @public
    class IOptimizationProfile:
        def __init__(self):
            self._shapes = {}

        def set_shape(self, input, min, opt, max):
            assert all(low <= best <= high for low, best, high in zip(min, opt, max)), (min, opt, max)
            self._shapes[input] = [list(min), list(opt), list(max)]

    @public
    class ITimingCache:
        def __init__(self, data, fits):
            self._data, self._fits = data, fits

        def serialize(self):
            return IHostMemory(self._data)

    @public
    class IBuilderConfig:
        def __init__(self):
            self.builder_optimization_level = 3
            self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
            self.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE
            self.progress_monitor = None
            self._flags, self._profiles, self._pools, self._cache = {trt.BuilderFlag.TF32}, [], {}, None

        def set_flag(self, flag):
            self._flags.add(flag)

        def clear_flag(self, flag):
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool, pool_size):
            self._pools[pool.name] = pool_size

        def add_optimization_profile(self, profile):
            self._profiles.append(profile._shapes)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache):
            here = f"timings of {device.name}, {workshop.version}\n".encode()
            if not serialized_timing_cache:
                return ITimingCache(here, True)
            if not serialized_timing_cache.startswith(b"timings of "):
                return None
            return ITimingCache(bytes(serialized_timing_cache), serialized_timing_cache.startswith(here))

        def set_timing_cache(self, cache, ignore_mismatch):
            if not cache._fits and not ignore_mismatch:
                return False
            self._cache = cache
            return True

        def get_timing_cache(self):
            return self._cache

    @public
    class ITensor:
        def __init__(self, name, shape):
            self.name, self.shape = name, shape

    @public
    class INetworkDefinition:
        def __init__(self, flags):
            assert flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED), flags
            self._graph, self._inputs = None, []

        @property
        def num_inputs(self):
            return len(self._inputs)

        def get_input(self, index):
            return self._inputs[index]

    @public
    class ParserError:
        def __init__(self, index, name, operator):
            self._index, self._name, self._operator = index, name, operator

        def node(self):
            return self._index

        def node_name(self):
            return self._name

        def node_operator(self):
            return self._operator

        def code(self):
            return 6

        def desc(self):
            return f"Invalid Node - {self._name}\nno plugin and no importer for it\n"

    @public
    class OnnxParser:
        def __init__(self, network, logger):
            ready(logger, ILogger)
            self._network, self._errors = network, []

        def parse_from_file(self, path):
            graph = Path(path).read_bytes()
            for i, (name, operator, _) in enumerate(read_nodes(graph)):
                if name == workshop.refused:
                    self._errors.append(ParserError(i, name, operator))
            if self._errors:
                return False
            session = open_session(graph)
            self._network._graph = graph
            self._network._inputs = [ITensor(i.name, tuple(i.shape)) for i in session.get_inputs()]
            return True

        @property
        def num_errors(self):
            return len(self._errors)

        def get_error(self, index):
            return self._errors[index]

    @public
    class Builder:
        def __init__(self, logger):
            ready(logger, ILogger)
            self._logger = logger
            if not workshop.starts:
                logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags):
            return INetworkDefinition(flags)

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            for shapes in config._profiles or [{}]:
                for tensor in network._inputs:
                    asked = shapes.get(tensor.name)
                    fixed = all(isinstance(side, int) for side in tensor.shape)
                    if asked is None and not fixed:
                        self._logger.log(ILogger.Severity.ERROR, f"no shapes of {tensor.name} in a profile")
                        return None
                    if asked and any(
                        isinstance(s, int) and s != a for shape in asked for s, a in zip(tensor.shape, shape)
                    ):
                        self._logger.log(
                            ILogger.Severity.ERROR, f"{tensor.name} is {tensor.shape}, its profile {asked}"
                        )
                        return None
            if not self._report(config.progress_monitor):
                return None
            workshop.builds.append(config)
            graph = network._graph if workshop.spoiled is None else spoiled(network._graph, workshop.spoiled)
            if config._cache is not None and hashlib.sha256(graph).hexdigest().encode() not in config._cache._data:
                config._cache._data += hashlib.sha256(graph).hexdigest().encode() + b"\n"
            facts = {
                "version": workshop.version, "gpu": device.name, "profiles": config._profiles,
                "portable": trt.BuilderFlag.VERSION_COMPATIBLE in config._flags, "level": config.hardware_compatibility_level.name,
                "detailed": config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED, "layers": make_layers(graph, workshop),
            }  # fmt: skip
            self._logger.log(ILogger.Severity.WARNING, "the double is slower than a GPU")
            return IHostMemory(MAGIC + json.dumps(facts).encode() + b"\n" + graph)

        def _report(self, monitor):
            if monitor is None:
                return True
            ready(monitor, IProgressMonitor)
            monitor.phase_start("Building Engine", None, workshop.steps)
            for step in range(workshop.steps):
                go_on = True
                with contextlib.suppress(BaseException):  # TensorRT goes on whatever a callback raises, Ctrl-C too
                    if workshop.on_step is not None:
                        workshop.on_step(step)
                    go_on = monitor.step_complete("Building Engine", step)
                if not go_on:
                    monitor.phase_finish("Building Engine")
                    self._logger.log(ILogger.Severity.ERROR, "the build was cancelled")
                    return False
            monitor.phase_finish("Building Engine")
            return True

    @public
    class Runtime:
        def __init__(self, logger):
            ready(logger, ILogger)
            self._logger, self.engine_host_code_allowed = logger, False
            if not workshop.starts:
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, serialized_engine):
            def refuse(why):
                self._logger.log(ILogger.Severity.ERROR, why)

            if not serialized_engine.startswith(MAGIC):
                return refuse("the plan's magic tag does not match")
            line, _, graph = serialized_engine[len(MAGIC) :].partition(b"\n")
            facts = json.loads(line)
            if facts["portable"] and not self.engine_host_code_allowed:
                return refuse("the plan carries host code, which is not allowed")
            if facts["version"] != workshop.version and not facts["portable"]:
                return refuse(f"the plan was built with TensorRT {facts['version']}")
            if facts["gpu"] != device.name and facts["level"] == "NONE":
                return refuse(f"the plan was built for {facts['gpu']}")
            return ICudaEngine(self, facts, graph)

    @public
    class EngineInspector:
        def __init__(self, engine):
            self._facts = engine._facts

        def get_engine_information(self, format):
            assert format == trt.LayerInformationFormat.JSON
            layers = self._facts["layers"] if self._facts["detailed"] else [la["Name"] for la in self._facts["layers"]]
            return json.dumps({"Layers": layers, "Bindings": []})

    @public
    class ICudaEngine:
        device_memory_size_v2 = 1 << 20

        def __init__(self, runtime, facts, graph):
            self._runtime, self._facts, self._graph = runtime, facts, graph
            self._session = open_session(graph)
            self._tensors = {t.name: t for t in (*self._session.get_inputs(), *self._session.get_outputs())}
            self._inputs = [t.name for t in self._session.get_inputs()]
            self._outputs = [t.name for t in self._session.get_outputs()]
            self._sizes = {}

        @property
        def num_io_tensors(self):
            return len(self._tensors)

        @property
        def num_optimization_profiles(self):
            return len(self._facts["profiles"])

        def get_tensor_name(self, index):
            return list(self._tensors)[index]

        def get_tensor_mode(self, name):
            return trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return trt.DataType[KINDS[self._tensors[name].type]]

        def create_engine_inspector(self):
            return EngineInspector(self)

        def create_execution_context(self):
            if workshop.contexts is not None:
                if not workshop.contexts:
                    return None
                workshop.contexts -= 1
            return IExecutionContext(self)

        def _dtype(self, name):
            return np.dtype(NUMPY[KINDS[self._tensors[name].type]])

        def _output_shapes(self, shapes):
            """Of every output for inputs of these shapes, found by running the graph on zeros."""
            key = tuple(sorted(shapes.items()))
            if key not in self._sizes:
                found = self._session.run(None, {n: np.zeros(s, self._dtype(n)) for n, s in shapes.items()})
                self._sizes[key] = {name: value.shape for name, value in zip(self._outputs, found)}
            return self._sizes[key]

    def alone(method):
        """A context is used by one thread at a time, or its answers are nobody's."""

        @functools.wraps(method)
        def held(self, *arguments):
            if not self._held.acquire(blocking=False):
                device.undefined.append(f"two threads were in {method.__name__} of one context")
                return False
            try:
                if workshop.dawdle:
                    time.sleep(workshop.dawdle)
                return method(self, *arguments)
            finally:
                self._held.release()

        return held

    @public
    class IExecutionContext:
        def __init__(self, engine):
            self._engine, self._profile, self._shapes, self._addresses = engine, 0, {}, {}
            self._profiler, self._held = None, threading.Lock()
            self._changes = 0  # a recording holds only for the state in which it was made
            self._queued = self._done = 0

        @property
        def profiler(self):
            return self._profiler

        @profiler.setter
        def profiler(self, value):
            if value is not None:
                ready(value, IProfiler)
            self._profiler = value
            self._changes += 1

        @alone
        def set_optimization_profile_async(self, profile_index, stream_handle):
            if not 0 <= profile_index < self._engine.num_optimization_profiles:
                return False
            stream = device.stream_of(stream_handle)
            if stream.recording is not None:
                return False
            if profile_index != self._profile:
                self._profile, self._shapes = profile_index, {}
                self._changes += 1
                self._settled = device.mark(stream)
            return True

        @alone
        def set_input_shape(self, name, shape):
            low, _, high = self._engine._facts["profiles"][self._profile][name]
            if len(shape) != len(low) or not all(a <= side <= b for a, side, b in zip(low, shape, high)):
                return False
            if self._shapes.get(name) != tuple(shape):
                self._shapes[name] = tuple(shape)
                self._changes += 1
            return True

        @alone
        def infer_shapes(self):
            return [name for name in self._engine._inputs if name not in self._shapes]

        def get_tensor_shape(self, name):
            if name in self._engine._inputs:
                return self._shapes.get(name, self._engine._tensors[name].shape)
            if self.infer_shapes():
                return tuple(side if isinstance(side, int) else -1 for side in self._engine._tensors[name].shape)
            return self._engine._output_shapes(self._shapes)[name]

        @alone
        def set_tensor_address(self, name, memory):
            if name not in self._engine._tensors:
                return False
            if self._addresses.get(name) != memory:
                self._addresses[name] = memory
                self._changes += 1
            return True

        @alone
        def execute_async_v3(self, stream_handle):
            with device.lock:
                return self._execute(stream_handle)

        def _execute(self, stream_handle):
            logger = self._engine._runtime._logger
            stream, engine = device.stream_of(stream_handle), self._engine
            missing = [n for n in engine._tensors if n not in self._addresses] + [
                n for n in engine._inputs if n not in self._shapes
            ]
            if missing:
                logger.log(ILogger.Severity.ERROR, f"address or shape of {missing} is not set")
                return False
            if (
                getattr(self, "_settled", None) is not None
                and self._settled.time is None
                and self._settled.stream is not stream
            ):
                device.undefined.append("an inference was queued before its profile was there")
            if workshop.enqueue_fails():
                stream.broken = True
                logger.log(ILogger.Severity.ERROR, "enqueueV3: it was planted")
                return False
            shapes, addresses, state = dict(self._shapes), dict(self._addresses), self._changes
            recorded = stream.recording is not None
            number = None
            if not recorded:
                self._queued += 1
                number = self._queued

            def compute():
                if recorded and self._changes != state:
                    device.undefined.append("a graph was replayed after its context was changed")
                if number is not None:
                    if number != self._done + 1:
                        device.undefined.append("two inferences of one context ran without an order between them")
                    self._done = max(self._done, number)
                self._compute(shapes, addresses)

            device.queue(stream, compute)
            return True

        def _compute(self, shapes, addresses):
            engine, feed = self._engine, {}
            spans = {}
            for name, shape in {**shapes, **engine._output_shapes(shapes)}.items():
                spans[name] = device.span(addresses[name], int(np.prod(shape)) * engine._dtype(name).itemsize)
                if spans[name] is None:
                    device.crash(f"the engine reached memory for {name} that is not there")
                    return
            for name, shape in shapes.items():
                feed[name] = np.frombuffer(spans[name], engine._dtype(name)).reshape(shape).copy()
            for name, value in zip(engine._outputs, engine._session.run(None, feed)):
                spans[name][:] = np.ascontiguousarray(value).tobytes()
            workshop.runs += 1
            if self._profiler is not None:
                for layer in engine._facts["layers"]:
                    self._profiler.report_layer_time(layer["Name"], 0.01)

    return trt


@functools.lru_cache(maxsize=32)
def open_session(graph):
    """The graph on the processor, as the backend ``onnxruntime-cpu`` has it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Array:
    """Memory of a ``Device`` as other libraries show theirs: ``__cuda_array_interface__``.

    ``stream``: on which it is being filled; ``strides`` as they are told.
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


def install(monkeypatch, device, workshop=None):
    """Put a device, and a TensorRT where one is given, where the project looks for them."""
    import sys

    import phreg_deploy.runtime.gpu.cuda as cuda

    monkeypatch.setattr(cuda, "_load", lambda: device.runtime)
    if workshop is not None:
        monkeypatch.setitem(sys.modules, "tensorrt", workshop.tensorrt)


def public_names(module):
    """Every name that the double claims NVIDIA to have: ``{class or "": [names]}``."""
    names = {"": [name for name in vars(module) if not name.startswith("_")]}
    for name in names[""]:
        thing = getattr(module, name)
        if isinstance(thing, type):
            own = [n for n in vars(thing) if not n.startswith("_")]
            if issubclass(thing, enum.Enum):
                own = list(thing.__members__)
            elif name == "IBuilderConfig":
                own += [n for n in vars(thing()) if not n.startswith("_")]
            names[name] = own
    return names


assert struct.calcsize("P") == 8, "addresses of 64 bits"
