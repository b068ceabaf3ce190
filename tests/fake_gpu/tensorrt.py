"""The fake module ``tensorrt``, and the class ``FakeTensorRT`` whose attributes tests set and read."""

import enum
import importlib.machinery
import types

from tests.fake_gpu import tensorrt_build, tensorrt_context, tensorrt_engine, tensorrt_types

NAMES = {
    tensorrt_types: [
        "BuilderFlag", "DataType", "HardwareCompatibilityLevel", "IHostMemory", "ILogger", "IOptimizationProfile",
        "IProfiler", "IProgressMonitor", "ITimingCache", "LayerInformationFormat", "MemoryPoolType",
        "NetworkDefinitionCreationFlag", "ProfilingVerbosity", "TensorIOMode", "nptype",
    ],
    tensorrt_build: ["IBuilderConfig", "INetworkDefinition", "ITensor", "ParserError"],
    tensorrt_engine: ["EngineInspector", "ICudaEngine"],
    tensorrt_context: ["IExecutionContext"],
}  # fmt: skip
# Callers create objects of these classes. A subclass for each ``FakeTensorRT`` gives them access to it.
ENTRIES = (tensorrt_build.Builder, tensorrt_build.OnnxParser, tensorrt_engine.Runtime)


class FakeTensorRT:
    """A TensorRT whose behaviour tests set before they use it.

    Attributes:
        module: the module ``tensorrt``.
        unfused_blocks: blocks whose attention is not fused.
        float_layers: linear layers that run in float although the graph has them in 8 bits.
        zeroed_weights: the start of the names of the weights that are zero in every engine.
        refused_node: the name of a node that the parser refuses.
        fail_enqueue: the inference, counted from now on, that fails to start.
        contexts: how many execution contexts can be created; None for any number.
        starts: whether CUDA can be initialised.
        steps, on_step: the number of steps of a build, and a function that is called in each.
        answer: what an engine makes of each output, a function of its name and values.
        wrong: whether an inference answers zeros, a function of its profile, batch, and "plain" or "replayed".
        inspected: what the inspector answers, instead of a description of the graph.
        delay: seconds that a caller occupies a context.
        builds: the configuration of each build.
        runs: how many inferences were computed.
    """

    def __init__(self, device, version="10.16.1"):
        self.device, self.version = device, version
        self.unfused_blocks, self.float_layers = set(), set()
        self.zeroed_weights = self.refused_node = self.fail_enqueue = self.contexts = self.on_step = None
        self.answer = lambda _name, values: values
        self.wrong = lambda _profile, _batch, _path: False
        self.inspected = None
        self.starts, self.steps, self.delay, self.builds, self.runs = True, 5, 0.0, [], 0
        self.module = make_module(self)

    def enqueue_fails(self):
        if self.fail_enqueue is None:
            return False
        self.fail_enqueue -= 1
        if self.fail_enqueue:
            return False
        self.fail_enqueue = None
        return True


def make_module(tensorrt):
    """Make the module ``tensorrt`` with every name that this project uses."""
    trt = types.ModuleType("tensorrt")
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    trt.__version__ = tensorrt.version
    for module, names in NAMES.items():
        for name in names:
            setattr(trt, name, getattr(module, name))
    for entry in ENTRIES:
        setattr(trt, entry.__name__, type(entry.__name__, (entry,), {"_tensorrt": tensorrt}))
    if tensorrt.version.startswith("10.3"):
        trt.HardwareCompatibilityLevel = tensorrt_types.OldHardwareCompatibilityLevel
    return trt


def public_names(module):
    """List every public name of the fake, which TensorRT must have too: ``{class or "": [names]}``."""
    names = {"": [name for name in vars(module) if not name.startswith("_")]}
    for name in names[""]:
        thing = getattr(module, name)
        if isinstance(thing, type):
            own = [n for kind in thing.__mro__[:-1] for n in vars(kind) if not n.startswith("_")]
            if issubclass(thing, enum.Enum):
                own = list(thing.__members__)
            elif name == "IBuilderConfig":
                own += [n for n in vars(thing()) if not n.startswith("_")]
            names[name] = own
    return names
