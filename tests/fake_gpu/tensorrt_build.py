"""The fake TensorRT's builder: a plan is the ONNX file behind a line of facts."""

import contextlib
import hashlib
import json
from pathlib import Path

from tests.fake_gpu.layers import make_layers
from tests.fake_gpu.onnx_file import read_nodes, spoiled
from tests.fake_gpu.tensorrt_types import (
    MAGIC,
    BuilderFlag,
    HardwareCompatibilityLevel,
    IHostMemory,
    ILogger,
    IOptimizationProfile,
    IProgressMonitor,
    ITimingCache,
    NetworkDefinitionCreationFlag,
    ProfilingVerbosity,
    open_session,
    ready,
)


class IBuilderConfig:
    def __init__(self, workshop=None):
        self._workshop = workshop
        self.builder_optimization_level = 3
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor = None
        self._flags, self._profiles, self._pools, self._cache = {BuilderFlag.TF32}, [], {}, None

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
        here = f"timings of {self._workshop.device.name}, {self._workshop.version}\n".encode()
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


class ITensor:
    def __init__(self, name, shape):
        self.name, self.shape = name, shape


class INetworkDefinition:
    def __init__(self, flags):
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED), flags
        self._graph, self._inputs = None, []

    @property
    def num_inputs(self):
        return len(self._inputs)

    def get_input(self, index):
        return self._inputs[index]


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


class OnnxParser:
    _workshop = None

    def __init__(self, network, logger):
        ready(logger, ILogger)
        self._network, self._errors = network, []

    def parse_from_file(self, path):
        graph = Path(path).read_bytes()
        for i, (name, operator, _) in enumerate(read_nodes(graph)):
            if name == self._workshop.refused:
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


class Builder:
    _workshop = None

    def __init__(self, logger):
        ready(logger, ILogger)
        self._logger = logger
        if not self._workshop.starts:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig(self._workshop)

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
                if asked and any(isinstance(s, int) and s != a for shape in asked for s, a in zip(tensor.shape, shape)):
                    self._logger.log(ILogger.Severity.ERROR, f"{tensor.name} is {tensor.shape}, its profile {asked}")
                    return None
        if not self._report(config.progress_monitor):
            return None
        self._workshop.builds.append(config)
        graph = network._graph if self._workshop.spoiled is None else spoiled(network._graph, self._workshop.spoiled)
        if config._cache is not None and hashlib.sha256(graph).hexdigest().encode() not in config._cache._data:
            config._cache._data += hashlib.sha256(graph).hexdigest().encode() + b"\n"
        facts = {
            "version": self._workshop.version, "gpu": self._workshop.device.name, "profiles": config._profiles,
            "portable": BuilderFlag.VERSION_COMPATIBLE in config._flags, "level": config.hardware_compatibility_level.name,
            "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED, "layers": make_layers(graph, self._workshop),
        }  # fmt: skip
        self._logger.log(ILogger.Severity.WARNING, "the double is slower than a GPU")
        return IHostMemory(MAGIC + json.dumps(facts).encode() + b"\n" + graph)

    def _report(self, monitor):
        if monitor is None:
            return True
        ready(monitor, IProgressMonitor)
        monitor.phase_start("Building Engine", None, self._workshop.steps)
        for step in range(self._workshop.steps):
            go_on = True
            with contextlib.suppress(BaseException):  # TensorRT goes on whatever a callback raises, Ctrl-C too
                if self._workshop.on_step is not None:
                    self._workshop.on_step(step)
                go_on = monitor.step_complete("Building Engine", step)
            if not go_on:
                monitor.phase_finish("Building Engine")
                self._logger.log(ILogger.Severity.ERROR, "the build was cancelled")
                return False
        monitor.phase_finish("Building Engine")
        return True
