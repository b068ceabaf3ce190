"""The fake TensorRT's engine, which computes with ONNX Runtime on the processor when its stream is synchronised."""

import functools
import json
import threading
import time

import numpy as np

from tests.fake_gpu.tensorrt_types import (
    KINDS,
    MAGIC,
    NUMPY,
    DataType,
    ILogger,
    IProfiler,
    LayerInformationFormat,
    TensorIOMode,
    check_initialised,
    open_session,
)


class Runtime:
    _tensorrt = None

    def __init__(self, logger):
        check_initialised(logger, ILogger)
        self._logger, self.engine_host_code_allowed = logger, False
        if not self._tensorrt.starts:
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
        if facts["version"] != self._tensorrt.version and not facts["portable"]:
            return refuse(f"the plan was built with TensorRT {facts['version']}")
        if facts["gpu"] != self._tensorrt.device.name and facts["level"] == "NONE":
            return refuse(f"the plan was built for {facts['gpu']}")
        return ICudaEngine(self, facts, graph)


class EngineInspector:
    def __init__(self, engine):
        self._facts = engine._facts

    def get_engine_information(self, format):
        assert format == LayerInformationFormat.JSON
        layers = self._facts["layers"] if self._facts["detailed"] else [la["Name"] for la in self._facts["layers"]]
        return json.dumps({"Layers": layers, "Bindings": []})


class ICudaEngine:
    device_memory_size_v2 = 1 << 20

    def __init__(self, runtime, facts, graph):
        self._runtime, self._facts, self._graph = runtime, facts, graph
        self._tensorrt = runtime._tensorrt
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
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType[KINDS[self._tensors[name].type]]

    def create_engine_inspector(self):
        return EngineInspector(self)

    def create_execution_context(self):
        if self._tensorrt.contexts is not None:
            if not self._tensorrt.contexts:
                return None
            self._tensorrt.contexts -= 1
        return IExecutionContext(self)

    def _dtype(self, name):
        return np.dtype(NUMPY[KINDS[self._tensors[name].type]])

    def _output_shapes(self, shapes):
        """Return the shape of every output for inputs of these shapes, found by running the graph on zeros."""
        key = tuple(sorted(shapes.items()))
        if key not in self._sizes:
            found = self._session.run(None, {n: np.zeros(s, self._dtype(n)) for n, s in shapes.items()})
            self._sizes[key] = {name: value.shape for name, value in zip(self._outputs, found)}
        return self._sizes[key]


def one_thread_at_a_time(method):
    """Report undefined behaviour if a second thread calls a method of a context while one is inside."""

    @functools.wraps(method)
    def held(self, *arguments):
        if not self._held.acquire(blocking=False):
            self._tensorrt.device.undefined.append(f"two threads were in {method.__name__} of one context")
            return False
        try:
            if self._tensorrt.delay:
                time.sleep(self._tensorrt.delay)
            return method(self, *arguments)
        finally:
            self._held.release()

    return held


class IExecutionContext:
    def __init__(self, engine):
        self._tensorrt = engine._tensorrt
        self._engine, self._profile, self._shapes, self._addresses = engine, 0, {}, {}
        self._profiler, self._held, self._profile_set = None, threading.Lock(), None
        # A recorded graph is valid only as long as this number stays the same.
        self._changes = 0
        self._queued = self._done = 0

    @property
    def profiler(self):
        return self._profiler

    @profiler.setter
    def profiler(self, value):
        if value is not None:
            check_initialised(value, IProfiler)
        self._profiler = value
        self._changes += 1

    @one_thread_at_a_time
    def set_optimization_profile_async(self, profile_index, stream_handle):
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return False
        stream = self._tensorrt.device.stream_of(stream_handle)
        if stream.recording is not None:
            return False
        if profile_index != self._profile:
            self._profile, self._shapes = profile_index, {}
            self._changes += 1
            self._profile_set = self._tensorrt.device.mark(stream)
        return True

    @one_thread_at_a_time
    def set_input_shape(self, name, shape):
        low, _, high = self._engine._facts["profiles"][self._profile][name]
        if len(shape) != len(low) or not all(a <= side <= b for a, side, b in zip(low, shape, high)):
            return False
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._changes += 1
        return True

    @one_thread_at_a_time
    def infer_shapes(self):
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._engine._inputs:
            return self._shapes.get(name, self._engine._tensors[name].shape)
        if self.infer_shapes():
            return tuple(side if isinstance(side, int) else -1 for side in self._engine._tensors[name].shape)
        return self._engine._output_shapes(self._shapes)[name]

    @one_thread_at_a_time
    def set_tensor_address(self, name, memory):
        if name not in self._engine._tensors:
            return False
        if self._addresses.get(name) != memory:
            self._addresses[name] = memory
            self._changes += 1
        return True

    @one_thread_at_a_time
    def execute_async_v3(self, stream_handle):
        with self._tensorrt.device.lock:
            return self._execute(stream_handle)

    def _execute(self, stream_handle):
        logger = self._engine._runtime._logger
        stream, engine = self._tensorrt.device.stream_of(stream_handle), self._engine
        missing = [name for name in engine._tensors if name not in self._addresses]
        missing += [name for name in engine._inputs if name not in self._shapes]
        if missing:
            logger.log(ILogger.Severity.ERROR, f"address or shape of {missing} is not set")
            return False
        profile_set = self._profile_set
        if profile_set is not None and profile_set.time is None and profile_set.stream is not stream:
            self._tensorrt.device.undefined.append("an inference was queued before its profile was set")
        if self._tensorrt.enqueue_fails():
            stream.broken = True
            logger.log(ILogger.Severity.ERROR, "enqueueV3: the test made it fail")
            return False
        shapes, addresses, state = dict(self._shapes), dict(self._addresses), self._changes
        recorded = stream.recording is not None
        number = None
        if not recorded:
            self._queued += 1
            number = self._queued

        def compute():
            if recorded and self._changes != state:
                self._tensorrt.device.undefined.append("a graph was replayed after its context was changed")
            if number is not None:
                if number != self._done + 1:
                    self._tensorrt.device.undefined.append(
                        "two inferences of one context ran without an order between them"
                    )
                self._done = max(self._done, number)
            self._compute(shapes, addresses)

        self._tensorrt.device.queue(stream, compute)
        return True

    def _compute(self, shapes, addresses):
        engine, feed = self._engine, {}
        spans = {}
        for name, shape in {**shapes, **engine._output_shapes(shapes)}.items():
            spans[name] = self._tensorrt.device.span(
                addresses[name], int(np.prod(shape)) * engine._dtype(name).itemsize
            )
            if spans[name] is None:
                self._tensorrt.device.crash(f"the engine reached memory for {name} that is not there")
                return
        for name, shape in shapes.items():
            feed[name] = np.frombuffer(spans[name], engine._dtype(name)).reshape(shape).copy()
        for name, value in zip(engine._outputs, engine._session.run(None, feed)):
            spans[name][:] = np.ascontiguousarray(value).tobytes()
        self._tensorrt.runs += 1
        if self._profiler is not None:
            for layer in engine._facts["layers"]:
                self._profiler.report_layer_time(layer["Name"], 0.01)
