"""Collect the TensorRT names that source files use.

They are attributes of a variable ``trt``, and of variables that are named for objects of TensorRT, such as ``builder``
or ``self._context``.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

# Name of a variable -> the TensorRT class of its object.
CLASSES = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
    "error": "ParserError", "tensor": "ITensor", "profile": "IOptimizationProfile", "engine": "ICudaEngine",
    "context": "IExecutionContext", "runtime": "Runtime", "inspector": "EngineInspector", "cache": "ITimingCache",
    "monitor": "IProgressMonitor", "diary": "ILogger", "logger": "ILogger",
}  # fmt: skip
# (file, variable): variables with such a name that hold an object of our own class.
OUR_VARIABLES = {
    ("build.py", "cache"),
    ("tensorrt_backend.py", "context"),
    ("execution.py", "profile"),
    ("timing.py", "context"),
}
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
# TensorRT calls the methods of these classes, so a subclass must have them all.
CALLBACKS = ("IProgressMonitor", "ILogger", "IProfiler")
# Names that 10.3 does not have. The code checks for them by hasattr, or by getattr with a default.
OPTIONAL = {"HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"}


@dataclass
class Uses:
    """The TensorRT names that files use, and the places (file:line) of each.

    ``names``: of the module. ``attributes``: by (class, name). ``keywords``: by (class, method, keyword). ``guarded``:
    checked for by hasattr, or getattr with a default. ``subclasses``: class -> the attributes of each subclass of ours.
    """

    names: dict[str, set[str]] = field(default_factory=dict)
    attributes: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    keywords: dict[tuple[str, str, str], set[str]] = field(default_factory=dict)
    guarded: dict[str, set[str]] = field(default_factory=dict)
    subclasses: dict[str, list[set[str]]] = field(default_factory=dict)


def dotted_parts(node):
    """Split ``self.trt.Logger`` into ["self", "trt", "Logger"]; empty for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def name_in_module(parts):
    """Return the dotted name after ``trt`` or ``self.trt``; empty if the chain starts otherwise."""
    for root in (["trt"], ["self", "trt"], ["self", "_trt"]):
        if parts[: len(root)] == root:
            return ".".join(parts[len(root) :])
    return ""


def add_uses(file, uses):
    """Add the names that one file uses; a file without a variable ``trt`` uses none."""
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
            add_use(uses, node.value, node.attr, place, caught)
        elif isinstance(node, ast.Call):
            by_name = isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr", "setattr")
            if by_name and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                guard = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
                add_use(uses, node.args[0], node.args[1].value, place, caught, guard)
            holder = tensorrt_class(node.func.value, place, caught) if isinstance(node.func, ast.Attribute) else None
            for keyword in node.keywords if holder else []:
                uses.keywords.setdefault((holder, node.func.attr, keyword.arg), set()).add(place)
        elif isinstance(node, ast.ClassDef):
            own = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            own |= {
                n.attr
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and dotted_parts(n.value) == ["self"]
            }
            for base in node.bases:
                if name_in_module(dotted_parts(base)):
                    uses.subclasses.setdefault(name_in_module(dotted_parts(base)), []).append(own)


def tensorrt_class(node, place, caught):
    """Return the TensorRT class that a variable's or an attribute's name stands for; None for other names."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    bare = name.lstrip("_")
    known = bare in CLASSES and name not in caught and (place.partition(":")[0], bare) not in OUR_VARIABLES
    return CLASSES[bare] if known else None


def add_use(uses, holder, name, place, caught, guard=False):
    parts = dotted_parts(holder)
    module = name_in_module([*parts, name])
    kind = None if module else tensorrt_class(holder, place, caught)
    if guard and (module or kind):
        uses.guarded.setdefault(module or f"{kind}.{name}", set()).add(place)
    elif module:
        uses.names.setdefault(module, set()).add(place)
    elif kind:
        uses.attributes.setdefault((kind, name), set()).add(place)


def collect_uses(files):
    uses = Uses()
    for file in files:
        add_uses(file, uses)
    return uses


def unknown_attributes(uses):
    """Return the attributes that are neither in ``METHODS`` nor defined by our own subclass."""
    unknown_names = {}
    for (kind, name), places in uses.attributes.items():
        ours = {attribute for own in uses.subclasses.get(kind, []) for attribute in own}
        if name not in METHODS[kind] | ours and f"{kind}.{name}" not in OPTIONAL:
            unknown_names[f"{kind}.{name}"] = places
    return unknown_names
