"""The fake TensorRT's parser and builder: a plan is a line of JSON facts, followed by the ONNX file."""

import contextlib
import hashlib
import json
from pathlib import Path

from tests.fake_gpu.layers import make_layers
from tests.fake_gpu.onnx_file import read_nodes, zero_weights
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
    check_initialised,
    open_session,
)


class IBuilderConfig:
    def __init__(self, tensorrt=None):
        self._tensorrt = tensorrt
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
        here = f"timings of {self._tensorrt.device.name}, {self._tensorrt.version}\n".encode()
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
    _tensorrt = None

    def __init__(self, network, logger):
        check_initialised(logger, ILogger)
        self._network, self._errors = network, []

    def parse_from_file(self, path):
        graph = Path(path).read_bytes()
        for i, (name, operator, _) in enumerate(read_nodes(graph)):
            if name == self._tensorrt.refused_node:
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
    _tensorrt = None

    def __init__(self, logger):
        check_initialised(logger, ILogger)
        self._logger = logger
        if not self._tensorrt.starts:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig(self._tensorrt)

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
        self._tensorrt.builds.append(config)
        graph = network._graph
        if self._tensorrt.zeroed_weights is not None:
            graph = zero_weights(graph, self._tensorrt.zeroed_weights)
        digest = hashlib.sha256(graph).hexdigest().encode()
        if config._cache is not None and digest not in config._cache._data:
            config._cache._data += digest + b"\n"
        facts = {
            "version": self._tensorrt.version,
            "gpu": self._tensorrt.device.name,
            "multiprocessors": self._tensorrt.device.multiprocessors,
            "profiles": config._profiles,
            "portable": BuilderFlag.VERSION_COMPATIBLE in config._flags,
            "level": config.hardware_compatibility_level.name,
            "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED,
            "layers": make_layers(graph, self._tensorrt),
        }
        self._logger.log(ILogger.Severity.WARNING, "the fake is slower than a GPU")
        return IHostMemory(MAGIC + json.dumps(facts).encode() + b"\n" + graph)

    def _report(self, monitor):
        if monitor is None:
            return True
        check_initialised(monitor, IProgressMonitor)
        monitor.phase_start("Building Engine", None, self._tensorrt.steps)
        for step in range(self._tensorrt.steps):
            go_on = True
            # TensorRT continues whatever a callback raises, even KeyboardInterrupt.
            with contextlib.suppress(BaseException):
                if self._tensorrt.on_step is not None:
                    self._tensorrt.on_step(step)
                go_on = monitor.step_complete("Building Engine", step)
            if not go_on:
                monitor.phase_finish("Building Engine")
                self._logger.log(ILogger.Severity.ERROR, "the build was cancelled")
                return False
        monitor.phase_finish("Building Engine")
        return True
