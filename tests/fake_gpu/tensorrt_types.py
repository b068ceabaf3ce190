"""Enums and small objects of the fake TensorRT, and the logger, monitor and profiler that callers subclass."""

import enum
import functools

import numpy as np

# ONNX Runtime's name of a type -> TensorRT's, and TensorRT's -> numpy's.
KINDS = {
    "tensor(uint8)": "UINT8",
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
    "tensor(int8)": "INT8",
}
NUMPY = {
    "UINT8": np.uint8,
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
}
# The start of every fake plan.
MAGIC = b"fake of a plan\n"

TensorIOMode = enum.IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
LayerInformationFormat = enum.IntEnum("LayerInformationFormat", {"ONELINE": 0, "JSON": 1})
ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", {"LAYER_NAMES_ONLY": 0, "NONE": 1, "DETAILED": 2})
MemoryPoolType = enum.IntEnum("MemoryPoolType", {"WORKSPACE": 0})
BuilderFlag = enum.IntEnum("BuilderFlag", {"TF32": 7, "VERSION_COMPATIBLE": 14})
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
DataType = enum.IntEnum("DataType", {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "UINT8": 5, "INT64": 8})
HardwareCompatibilityLevel = enum.IntEnum(
    "HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1, "SAME_COMPUTE_CAPABILITY": 2}
)
OldHardwareCompatibilityLevel = enum.IntEnum("HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1})


def nptype(trt_type):
    return NUMPY[trt_type.name]


def check_initialised(thing, kind):
    """Assert that ``thing`` is a ``kind`` whose ``__init__`` was called; pybind11 refuses other objects."""
    assert isinstance(thing, kind), f"{thing} is no {kind.__name__}"
    assert getattr(thing, "_initialised", False), f"{type(thing).__name__} never called {kind.__name__}.__init__"


class Subclassed:
    """Remembers whether a subclass called ``__init__``."""

    def __init__(self):
        self._initialised = True


class ILogger(Subclassed):
    Severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    def log(self, severity, msg):
        raise NotImplementedError


class IProgressMonitor(Subclassed):
    pass


class IProfiler(Subclassed):
    pass


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


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        assert all(low <= best <= high for low, best, high in zip(min, opt, max)), (min, opt, max)
        self._shapes[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, data, fits):
        self._data, self._fits = data, fits

    def serialize(self):
        return IHostMemory(self._data)


@functools.lru_cache(maxsize=32)
def open_session(graph):
    """Load the graph on the processor, as the backend ``onnxruntime-cpu`` does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
