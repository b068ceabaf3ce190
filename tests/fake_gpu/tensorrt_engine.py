"""The fake TensorRT's engine, which computes with ONNX Runtime on the processor when its stream is synchronised."""

import json

import numpy as np

from tests.fake_gpu.tensorrt_context import IExecutionContext
from tests.fake_gpu.tensorrt_types import (
    KINDS,
    MAGIC,
    NUMPY,
    DataType,
    ILogger,
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
        if (
            facts["gpu"] != self._tensorrt.device.name
            or facts["multiprocessors"] != self._tensorrt.device.multiprocessors
        ):
            why = "Using an engine plan file across different models of devices is not recommended"
            self._logger.log(
                ILogger.Severity.WARNING, f"{why} and is likely to affect performance or even cause errors."
            )
        return ICudaEngine(self, facts, graph)


class EngineInspector:
    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, format):
        """List the layers of every profile; those of the second have the ending " [profile 1]", as NVIDIA's."""
        assert format == LayerInformationFormat.JSON
        if self._engine._tensorrt.inspected is not None:
            return self._engine._tensorrt.inspected
        facts = self._engine._facts
        layers = []
        for profile in range(len(facts["profiles"])):
            ending = f" [profile {profile}]" if profile else ""
            layers += [{**layer, "Name": layer["Name"] + ending} for layer in facts["layers"]]
        return json.dumps({"Layers": layers if facts["detailed"] else [la["Name"] for la in layers], "Bindings": []})


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
        self._index = self._tensorrt.device.index

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

    def _compute(self, shapes, addresses, profile, path, profiler):
        """Compute one inference on the memory at these addresses; ``path``: "plain" or "replayed" from a graph."""
        device, feed, spans = self._tensorrt.device, {}, {}
        for name, shape in {**shapes, **self._output_shapes(shapes)}.items():
            size = int(np.prod(shape)) * self._dtype(name).itemsize
            region = device.memory.find(addresses[name], size)
            if region is None or region.index != self._index:
                device.crash(f"the engine reached memory for {name} that is not there")
                return
            spans[name] = device.span(addresses[name], size)
        for name, shape in shapes.items():
            feed[name] = np.frombuffer(spans[name], self._dtype(name)).reshape(shape).copy()
        wrong = self._tensorrt.wrong(profile, next(iter(shapes.values()))[0], path)
        for name, value in zip(self._outputs, self._session.run(None, feed)):
            answer = self._tensorrt.answer(name, value)
            spans[name][:] = np.ascontiguousarray(np.zeros_like(answer) if wrong else answer).tobytes()
        self._tensorrt.runs += 1
        if profiler is not None:
            for layer in self._facts["layers"]:
                profiler.report_layer_time(layer["Name"], 0.01)
