"""The fake module ``tensorrt`` and its ``Workshop``, which tests turn and read."""

import enum
import importlib.machinery
import types

from tests.fake_gpu import tensorrt_build, tensorrt_engine, tensorrt_types

NAMES = {
    tensorrt_types: [
        "BuilderFlag", "DataType", "HardwareCompatibilityLevel", "IHostMemory", "ILogger", "IOptimizationProfile", "IProfiler",
        "IProgressMonitor", "ITimingCache", "LayerInformationFormat", "MemoryPoolType", "NetworkDefinitionCreationFlag",
        "ProfilingVerbosity", "TensorIOMode", "nptype",
    ],
    tensorrt_build: ["IBuilderConfig", "INetworkDefinition", "ITensor", "ParserError"],
    tensorrt_engine: ["EngineInspector", "ICudaEngine", "IExecutionContext"],
}  # fmt: skip
# Classes that callers make themselves, so that they learn the workshop by a subclass of its own.
ENTRIES = (tensorrt_build.Builder, tensorrt_build.OnnxParser, tensorrt_engine.Runtime)


class Workshop:
    """TensorRT's surroundings, for tests to turn.

    ``unfused``: blocks whose attention stays in pieces; ``floats``: linear layers that lose their 8 bits; ``spoiled``: start
    of the name of weights that every engine gets wrong; ``refused``: a node that the parser does not take; ``fail_enqueue``:
    which one from now on fails; ``contexts``: how many can be made; ``steps``: of a build; ``on_step``: called in each;
    ``answer``: what an engine makes of each output, (name, values) -> values; ``dawdle``: seconds that a context is held by its caller; ``builds``: what each build was asked for.
    """

    def __init__(self, device, version="10.16.1"):
        self.device, self.version = device, version
        self.unfused, self.floats = set(), set()
        self.spoiled = self.refused = self.fail_enqueue = self.contexts = self.on_step = None
        self.answer = lambda _name, values: values
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


def make_tensorrt(workshop):
    """The module ``tensorrt``, as far as it is called."""
    trt = types.ModuleType("tensorrt")
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    trt.__version__ = workshop.version
    for module, names in NAMES.items():
        for name in names:
            setattr(trt, name, getattr(module, name))
    for entry in ENTRIES:
        setattr(trt, entry.__name__, type(entry.__name__, (entry,), {"_workshop": workshop}))
    if workshop.version.startswith("10.3"):
        trt.HardwareCompatibilityLevel = tensorrt_types.OldHardwareCompatibilityLevel
    return trt


def public_names(module):
    """Every name that the double claims NVIDIA to have: ``{class or "": [names]}``."""
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
