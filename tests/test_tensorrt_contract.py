"""Every TensorRT name that the code uses exists in NVIDIA's own bindings of 10.3, 10.16 and 11.4; no GPU is needed.

The names are collected from the code: attributes of a variable ``trt``, and of variables that are named for objects of
TensorRT, such as ``builder`` or ``self._context``.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import nvidia
from tests.cli_helpers import ROOT

PACKAGE = ROOT / "phreg_deploy"
# Name of a variable -> the class of what it holds.
CLASSES = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
    "error": "ParserError", "tensor": "ITensor", "profile": "IOptimizationProfile", "engine": "ICudaEngine",
    "context": "IExecutionContext", "runtime": "Runtime", "inspector": "EngineInspector", "cache": "ITimingCache",
    "monitor": "IProgressMonitor", "diary": "ILogger", "logger": "ILogger",
}  # fmt: skip
# (file, variable): variables that hold an object of a class of ours.
OUR_VARIABLES = {("build.py", "cache"), ("tensorrt_backend.py", "context"), ("trt_context.py", "profile")}
METHODS = {
    "Builder": {"create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"},
    "IBuilderConfig": {
        "add_optimization_profile", "builder_optimization_level", "clear_flag", "create_timing_cache",
        "get_timing_cache", "hardware_compatibility_level", "profiling_verbosity", "progress_monitor", "set_flag",
        "set_memory_pool_limit", "set_timing_cache",
    },
    "INetworkDefinition": {
        "add_input", "add_matrix_multiply", "mark_output", "get_input", "get_layer", "get_output", "num_inputs",
        "num_layers", "num_outputs",
    },
    "OnnxParser": {"get_error", "num_errors", "parse", "parse_from_file"},
    "ParserError": {"code", "desc", "node", "node_name", "node_operator"},
    "ITensor": {"dtype", "name", "shape"},
    "IOptimizationProfile": {"set_shape"},
    "ICudaEngine": {
        "create_engine_inspector", "create_execution_context", "device_memory_size_v2", "get_tensor_dtype",
        "get_tensor_mode", "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors",
        "num_layers", "num_optimization_profiles",
    },
    "IExecutionContext": {
        "execute_async_v3", "get_tensor_shape", "infer_shapes", "profiler", "set_input_shape",
        "set_optimization_profile_async", "set_tensor_address",
    },
    "Runtime": {"deserialize_cuda_engine", "engine_host_code_allowed"},
    "EngineInspector": {"execution_context", "get_engine_information"},
    "ITimingCache": {"serialize"},
    "IProgressMonitor": {"phase_finish", "phase_start", "step_complete"},
    "ILogger": {"log"},
    "IProfiler": {"report_layer_time"},
}  # fmt: skip
# TensorRT calls the methods of these: a subclass must have them all.
CALLED = ("IProgressMonitor", "ILogger", "IProfiler")
# Names that 10.3 does not have. The code checks for them by hasattr, or by getattr with a default.
OPTIONAL = {"HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"}


@dataclass
class Uses:
    """The TensorRT names that files use -> the places where they are used.

    ``names``: of the module. ``attributes``: by (class, name). ``keywords``: by (class, method, keyword). ``guarded``:
    checked for by hasattr, or getattr with a default. ``subclasses``: class -> the attributes of each subclass of ours.
    """

    names: dict[str, set[str]] = field(default_factory=dict)
    attributes: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    keywords: dict[tuple[str, str, str], set[str]] = field(default_factory=dict)
    guarded: dict[str, set[str]] = field(default_factory=dict)
    subclasses: dict[str, list[set[str]]] = field(default_factory=dict)


def chain(node):
    """Split ``self.trt.Logger`` into ["self", "trt", "Logger"]; empty for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def on_module(parts):
    """Return the dotted name after ``trt`` or ``self.trt``; empty if the chain starts otherwise."""
    for root in (["trt"], ["self", "trt"], ["self", "_trt"]):
        if parts[: len(root)] == root:
            return ".".join(parts[len(root) :])
    return ""


def read(file, uses):
    """Add what one file uses; a file without a variable ``trt`` uses nothing."""
    tree = ast.parse(Path(file).read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }
    if not {"trt", "_trt"} & (names | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}):
        return
    caught = {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler)}
    for node in ast.walk(tree):
        place = f"{Path(file).name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            note(uses, node.value, node.attr, place, caught)
        elif isinstance(node, ast.Call):
            by_name = isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr", "setattr")
            if by_name and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                guard = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
                note(uses, node.args[0], node.args[1].value, place, caught, guard)
            holder = class_of(node.func.value, place, caught) if isinstance(node.func, ast.Attribute) else None
            for keyword in node.keywords if holder else []:
                uses.keywords.setdefault((holder, node.func.attr, keyword.arg), set()).add(place)
        elif isinstance(node, ast.ClassDef):
            own = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            own |= {
                n.attr
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and chain(n.value) == ["self"]
            }
            for base in node.bases:
                if on_module(chain(base)):
                    uses.subclasses.setdefault(on_module(chain(base)), []).append(own)


def class_of(node, place, caught):
    """Return the TensorRT class of what a variable or an attribute holds, by its name; None for another class."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    bare = name.lstrip("_")
    known = bare in CLASSES and name not in caught and (place.partition(":")[0], bare) not in OUR_VARIABLES
    return CLASSES[bare] if known else None


def note(uses, holder, name, place, caught, guard=False):
    parts = chain(holder)
    module = on_module([*parts, name])
    kind = None if module else class_of(holder, place, caught)
    if guard and (module or kind):
        uses.guarded.setdefault(module or f"{kind}.{name}", set()).add(place)
    elif module:
        uses.names.setdefault(module, set()).add(place)
    elif kind:
        uses.attributes.setdefault((kind, name), set()).add(place)


def read_all(files):
    uses = Uses()
    for file in files:
        read(file, uses)
    return uses


@pytest.fixture(scope="module")
def uses():
    return read_all(sorted(file for room in ("export", "runtime") for file in (PACKAGE / room).rglob("*.py")))


def unknown(uses):
    """Return attributes that are neither in ``METHODS`` nor of a subclass of ours."""
    unknown_names = {}
    for (kind, name), places in uses.attributes.items():
        ours = {attribute for own in uses.subclasses.get(kind, []) for attribute in own}
        if name not in METHODS[kind] | ours and f"{kind}.{name}" not in OPTIONAL:
            unknown_names[f"{kind}.{name}"] = places
    return unknown_names


MISSING = """
import tensorrt as trt

def exists(name):
    value = trt
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True

def takes(kind, method, keyword):
    return f"{keyword}:" in (getattr(getattr(trt, kind), method).__doc__ or "")

print(json.dumps({
    "version": trt.__version__,
    "names": [name for name in given["names"] if not exists(name)],
    "keywords": [k for k in given["keywords"] if exists(".".join(k[:2])) and not takes(*k)],
}))
"""


def missing(version, names, keywords=()):
    """Return which of these a version of TensorRT does not have."""
    answer = nvidia.inside(version, MISSING, {"names": sorted(names), "keywords": sorted(keywords)})
    assert answer["version"] == version
    return {*answer["names"], *(f"{kind}.{method}({keyword}=)" for kind, method, keyword in answer["keywords"])}


def test_the_code_uses_tensorrt_where_this_test_looks(uses):
    assert {"Builder", "OnnxParser", "Runtime", "BuilderFlag.TF32"} <= set(uses.names)
    assert {("Builder", "build_serialized_network"), ("IExecutionContext", "execute_async_v3")} <= set(uses.attributes)
    assert set(uses.subclasses) <= set(CALLED)


@pytest.mark.parametrize("version", nvidia.VERSIONS)
def test_every_name_that_the_code_uses_exists(uses, version):
    absent = missing(version, set(uses.names) - OPTIONAL)
    assert not {name: uses.names[name] for name in absent}


def test_every_attribute_that_the_code_uses_is_in_the_table(uses):
    assert not unknown(uses)


@pytest.mark.parametrize("version", nvidia.VERSIONS)
def test_the_table_is_true_and_keywords_are_taken(uses, version):
    theirs = {(kind, method, keyword) for kind, method, keyword in uses.keywords if method in METHODS[kind]}
    assert not missing(version, {f"{kind}.{name}" for kind, names in METHODS.items() for name in names}, theirs)


def test_optional_names_are_checked_for_before_use(uses):
    used = set(uses.names) | {f"{kind}.{name}" for kind, name in uses.attributes}
    assert set(uses.guarded) <= OPTIONAL, "a name that every version has needs no guard; one that 10.3 lacks is listed"
    assert used & OPTIONAL <= set(uses.guarded)
    for name in used & OPTIONAL:
        files = [{place.partition(":")[0] for place in places.get(name, ())} for places in (uses.names, uses.guarded)]
        assert files[0] <= files[1], f"{name} is used in a file that does not check for it"


def test_optional_names_came_after_the_oldest_version():
    assert missing(nvidia.VERSIONS[0], OPTIONAL) == OPTIONAL
    assert not missing(nvidia.NEWEST, OPTIONAL)


@pytest.mark.parametrize("kind", CALLED)
def test_subclasses_have_all_methods_that_tensorrt_calls(uses, kind):
    for own in uses.subclasses.get(kind, []):
        assert METHODS[kind] <= own
        assert "__init__" in own, "without the base's __init__ the bindings refuse the object"


PLANTED = """
def build(trt, config, profiles):
    builder = trt.Builder(trt.Logger())
    config.set_flag(trt.BuilderFlag.FP16)
    config.int8_calibrator = trt.IInt8EntropyCalibrator2()
    config.set_timing_cache(builder, skip_mismatch=True)
    if hasattr(trt, "IAttention"):
        level = getattr(trt.BuilderFlag, "TF32")
    try:
        pass
    except OSError as error:
        print(error.strerror)

class Watch(trt.IProgressMonitor):
    def __init__(self):
        trt.IProgressMonitor.__init__(self)
        self.interrupted = None

    def seen(self):
        return self.interrupted

class Plan:
    def run(self):
        self._context.execute_v9(self.trt.TensorIOMode.SIDEWAYS)
        self._context.set_tensor_address("image", 0)
        self.monitor.interrupted, self.monitor.finished
"""


@pytest.fixture
def planted(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    return read_all([tmp_path / "planted.py"])


def test_names_that_do_not_exist_are_found_in_the_code(planted):
    assert set(planted.names) == {
        "Builder",
        "Logger",
        "BuilderFlag",
        "BuilderFlag.FP16",
        "BuilderFlag.TF32",
        "IInt8EntropyCalibrator2",
        "IProgressMonitor",
        "IProgressMonitor.__init__",
        "TensorIOMode",
        "TensorIOMode.SIDEWAYS",
    }
    assert set(unknown(planted)) == {
        "IBuilderConfig.int8_calibrator",
        "IExecutionContext.execute_v9",
        "IProgressMonitor.finished",
    }
    assert set(planted.guarded) == {"IAttention"}
    assert not METHODS["IProgressMonitor"] <= planted.subclasses["IProgressMonitor"][0]


@pytest.mark.parametrize(
    ("version", "absent"),
    [
        ("10.3.0", {"TensorIOMode.SIDEWAYS"}),
        ("11.4.0.106", {"TensorIOMode.SIDEWAYS", "BuilderFlag.FP16", "IInt8EntropyCalibrator2"}),
    ],
)
def test_names_that_do_not_exist_are_missed_in_the_bindings(planted, version, absent):
    keyword = ("IBuilderConfig", "set_timing_cache", "skip_mismatch")
    assert set(planted.keywords) == {keyword}
    assert missing(version, planted.names, planted.keywords) == absent | {
        "IBuilderConfig.set_timing_cache(skip_mismatch=)"
    }


def test_nothing_is_made_without_a_library():
    """The shim alone returns NULL, which the bindings turn into an error, as where CUDA does not start."""
    code = """
import tensorrt as trt
try:
    trt.Builder(trt.Logger())
except (TypeError, RuntimeError) as error:
    print(json.dumps(str(error)))
"""
    assert "nullptr" in nvidia.inside(nvidia.NEWEST, code)


def test_the_lean_runtime_has_what_serving_needs():
    """It has every name that the runtime's files use; only the builder reads an engine's layers."""
    needed = Uses()
    for file in sorted((ROOT / "phreg_deploy" / "runtime").rglob("*.py")):
        read(file, needed)
    wanted = set(needed.names) | {f"{kind}.{name}" for kind, name in needed.attributes if name in METHODS[kind]}
    assert {"Runtime", "IExecutionContext.execute_async_v3", "ICudaEngine.create_execution_context"} <= wanted
    code = """
import functools
import tensorrt as trt
def exists(name):
    try:
        functools.reduce(getattr, name.split("."), trt)
    except AttributeError:
        return False
    return True
print(json.dumps([name for name in given if not exists(name)]))
"""
    assert nvidia.inside("lean", code, sorted(wanted - OPTIONAL)) == []
