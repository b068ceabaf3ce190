"""Every TensorRT name that the code uses exists in NVIDIA's own bindings of 10.3, 10.16 and 11.4; no GPU is needed."""

import pytest

from tests import nvidia
from tests.cli_helpers import ROOT
from tests.tensorrt_names import CALLBACKS, METHODS, OPTIONAL, Uses, add_uses, collect_uses, unknown_attributes

PACKAGE = ROOT / "phreg_deploy"


@pytest.fixture(scope="module")
def uses():
    return collect_uses(sorted(file for room in ("export", "runtime") for file in (PACKAGE / room).rglob("*.py")))


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


def missing_names(version, names, keywords=()):
    """Return the names and keywords that a version of TensorRT lacks."""
    answer = nvidia.inside(version, MISSING, {"names": sorted(names), "keywords": sorted(keywords)})
    assert answer["version"] == version
    return {*answer["names"], *(f"{kind}.{method}({keyword}=)" for kind, method, keyword in answer["keywords"])}


def test_the_code_uses_tensorrt_where_this_test_looks(uses):
    assert {"Builder", "OnnxParser", "Runtime", "BuilderFlag.TF32"} <= set(uses.names)
    assert {("Builder", "build_serialized_network"), ("IExecutionContext", "execute_async_v3")} <= set(uses.attributes)
    assert set(uses.subclasses) <= set(CALLBACKS)


@pytest.mark.parametrize("version", nvidia.VERSIONS)
def test_every_name_that_the_code_uses_exists(uses, version):
    absent = missing_names(version, set(uses.names) - OPTIONAL)
    assert not {name: uses.names[name] for name in absent}


def test_every_attribute_that_the_code_uses_is_in_the_table(uses):
    assert not unknown_attributes(uses)


@pytest.mark.parametrize("version", nvidia.VERSIONS)
def test_the_table_is_true_and_keywords_are_taken(uses, version):
    theirs = {(kind, method, keyword) for kind, method, keyword in uses.keywords if method in METHODS[kind]}
    assert not missing_names(version, {f"{kind}.{name}" for kind, names in METHODS.items() for name in names}, theirs)


def test_optional_names_are_checked_for_before_use(uses):
    used = set(uses.names) | {f"{kind}.{name}" for kind, name in uses.attributes}
    assert set(uses.guarded) <= OPTIONAL, "a name that every version has needs no guard; one that 10.3 lacks is listed"
    assert used & OPTIONAL <= set(uses.guarded)
    for name in used & OPTIONAL:
        files = [{place.partition(":")[0] for place in places.get(name, ())} for places in (uses.names, uses.guarded)]
        assert files[0] <= files[1], f"{name} is used in a file that does not check for it"


def test_optional_names_came_after_the_oldest_version():
    assert missing_names(nvidia.VERSIONS[0], OPTIONAL) == OPTIONAL
    assert not missing_names(nvidia.NEWEST, OPTIONAL)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_subclasses_have_all_methods_that_tensorrt_calls(uses, kind):
    for own in uses.subclasses.get(kind, []):
        assert METHODS[kind] <= own
        assert "__init__" in own, "without the base's __init__ the bindings refuse the object"


WRONG_CODE = """
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
def wrong_uses(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG_CODE)
    return collect_uses([tmp_path / "wrong.py"])


def test_names_that_do_not_exist_are_found_in_the_code(wrong_uses):
    assert set(wrong_uses.names) == {
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
    assert set(unknown_attributes(wrong_uses)) == {
        "IBuilderConfig.int8_calibrator",
        "IExecutionContext.execute_v9",
        "IProgressMonitor.finished",
    }
    assert set(wrong_uses.guarded) == {"IAttention"}
    assert not METHODS["IProgressMonitor"] <= wrong_uses.subclasses["IProgressMonitor"][0]


@pytest.mark.parametrize(
    ("version", "absent"),
    [
        ("10.3.0", {"TensorIOMode.SIDEWAYS"}),
        ("11.4.0.106", {"TensorIOMode.SIDEWAYS", "BuilderFlag.FP16", "IInt8EntropyCalibrator2"}),
    ],
)
def test_names_that_do_not_exist_are_missed_in_the_bindings(wrong_uses, version, absent):
    keyword = ("IBuilderConfig", "set_timing_cache", "skip_mismatch")
    assert set(wrong_uses.keywords) == {keyword}
    assert missing_names(version, wrong_uses.names, wrong_uses.keywords) == absent | {
        "IBuilderConfig.set_timing_cache(skip_mismatch=)"
    }


def test_no_object_can_be_created_without_a_library():
    """The shim alone returns NULL, which the bindings report as if CUDA did not start."""
    code = """
import tensorrt as trt
try:
    trt.Builder(trt.Logger())
except (TypeError, RuntimeError) as error:
    print(json.dumps(str(error)))
"""
    assert "nullptr" in nvidia.inside(nvidia.NEWEST, code)


def test_the_lean_runtime_has_what_serving_needs():
    """It has every name that the files of ``runtime/`` use."""
    needed = Uses()
    for file in sorted((ROOT / "phreg_deploy" / "runtime").rglob("*.py")):
        add_uses(file, needed)
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
