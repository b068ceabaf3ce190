"""INT8 is exact on processors without 8-bit dot products, whose default kernels clip sums of two products at 16 bits.

Separate processes run on such a processor: OpenVINO obeys ONEDNN_MAX_CPU_ISA, and ONNX Runtime runs on QEMU's model of
a Haswell if qemu-x86_64 is installed (Debian's package qemu-user).
"""

import json
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from phreg_deploy.calibration.kernels import count
from phreg_deploy.runtime.backends.instructions import EXACT, EightBits, advice, eight_bits, read_eight_bits

QEMU = shutil.which("qemu-x86_64")
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 has kernels that saturate")
emulated = pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed (Debian's package qemu-user)")
WIDTH = 64
EXPECTED = WIDTH * 255 * 127  # in every output; two products are 64770, which 16 bits do not hold


def largest_products():
    """Uint8 inputs and int8 weights at the ends of their ranges, with the Q/DQ that bundles have."""
    constants = {
        "step": np.float32(1),
        "zero": np.uint8(0),
        "layer.int8": np.full((WIDTH, WIDTH), 127, np.int8),
        "weight_step": np.ones(WIDTH, np.float32),
        "weight_zero": np.zeros(WIDTH, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["layer.int8", "weight_step", "weight_zero"], ["w"], axis=1),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, WIDTH])  # noqa: E731
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "largest", [value("x")], [value("y")], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


RUN = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.optimized_model_filepath = sys.argv[2]
if sys.argv[3:]:
    options.add_session_config_entry(*sys.argv[3:])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(float(session.run(None, {"x": numpy.full((1, 4, 64), 255, numpy.float32)})[0].max()))
"""


def run_largest(folder, *option, prefix=()):
    """Run ``largest_products`` in a new process; return the largest output, and ONNX Runtime's optimised graph."""
    import onnx

    onnx.save(largest_products(), folder / "largest.onnx")
    optimized = folder / "optimized.onnx"
    command = [*prefix, sys.executable, "-c", RUN, str(folder / "largest.onnx"), str(optimized), *option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return float(done.stdout), onnx.load(optimized)


def test_a_session_is_exact_on_this_processor(tmp_path):
    found, optimized = run_largest(tmp_path, *EXACT)
    assert found == EXPECTED
    assert count(optimized, ["layer"]).integer == ["layer"], "and an integer kernel computed it"


@x86
@emulated
def test_a_session_is_exact_without_vnni_where_the_default_is_not(tmp_path):
    haswell = (QEMU, "-cpu", "Haswell")
    assert run_largest(tmp_path, prefix=haswell)[0] < 0.6 * EXPECTED, "the emulated processor saturates"
    found, optimized = run_largest(tmp_path, *EXACT, prefix=haswell)
    assert found == EXPECTED
    assert "layer.int8_s8_2_u8" in {tensor.name for tensor in optimized.graph.initializer}
    assert count(optimized, ["layer"]).integer == ["layer"]


OPENVINO = """
import json, sys, numpy
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.backends import openvino_backend
from phreg_deploy.runtime.backends.registry import open_backend
from phreg_deploy.runtime.backends.openvino_exact import saturates
from phreg_deploy.runtime.parity import run_exam, worst
from phreg_deploy.runtime.backends.options import BackendOptions

bundle = sys.argv[1]
found = {"saturates": saturates()}
with FeatureExtractor.load(bundle, "openvino", threads=1, compute=sys.argv[2]) as extractor:
    found["exact"] = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)]).to_json()
    found["choice"], found["compute"] = extractor.choice, extractor.compute
    found["integer"] = len(extractor.opened.integer_layers)
openvino_backend.saturates = lambda: False
backend = open_backend(Bundle.read(bundle), "openvino", BackendOptions(1, "fp32"))
with FeatureExtractor(Bundle.read(bundle), backend) as extractor:
    found["default"] = worst([case.parity for case in run_exam(extractor.bundle, extractor.run)]).to_json()
print(json.dumps(found))
"""


def openvino(bundle, **environment):
    pytest.importorskip("openvino")
    command = [sys.executable, "-c", OPENVINO, str(bundle), "auto"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@x86
def test_openvino_computes_int8_in_float_where_its_kernels_saturate(int8_bundle):
    found = openvino(int8_bundle, ONEDNN_MAX_CPU_ISA="AVX2")
    assert found["saturates"]
    assert found["integer"] == 0
    assert found["compute"] == "fp32"
    assert "computed in float32" in found["choice"]
    error = {name: 1 - found[name]["cosine_mean"] for name in ("exact", "default")}
    assert error["exact"] < 1e-4
    assert error["default"] > 5 * error["exact"], "the default kernels are measurably wrong on the forced processor"


def test_openvino_keeps_its_integer_kernels_where_they_are_exact(int8_bundle):
    found = openvino(int8_bundle)
    if found["saturates"]:
        pytest.skip("this processor's kernels saturate; the test above covers it")
    assert found["integer"] == 12
    assert found["exact"]["cosine_mean"] > 0.999


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "names"),
    [
        ("flags\t\t: fpu sse4_1 avx2 fma\n", "x86_64", ()),
        ("flags : avx2 avx_vnni avx512_vnni avx512f amx_int8\n", "x86_64", ("AVX-VNNI", "AVX512-VNNI", "AMX")),
        ("flags : avx512f avx512bw\n", "AMD64", ()),
        ("Features\t: fp asimd asimddp i8mm\n", "aarch64", ("dot product", "i8mm")),
        ("Features\t: fp asimd crc32\n", "aarch64", ()),
        ("processor : 0\n", "x86_64", None),
        ("flags : avx2\n", "riscv64", None),
    ],
)
def test_instructions_are_read_from_the_system(cpuinfo, machine, names):
    found = read_eight_bits(cpuinfo, machine)
    assert found == EightBits(names)
    assert found.missing == (names == ())


@pytest.fixture
def without_dot_products(monkeypatch):
    monkeypatch.setattr("phreg_deploy.runtime.backends.instructions.eight_bits", lambda: EightBits(()))
    monkeypatch.setattr("phreg_deploy.doctor.doctor.eight_bits", lambda: EightBits(()))


def count_notes(outcome):
    """Count how often a command reports that INT8 gains little on this processor."""
    assert outcome.code == 0, outcome.err
    return " ".join((outcome.out + outcome.err).split()).count("INT8 is about as fast as FP32")


def test_commands_report_that_int8_gains_little_on_this_processor(without_dot_products, int8_bundle, bundle, run_cli):
    assert count_notes(run_cli("inspect", int8_bundle)) == 1
    assert count_notes(run_cli("inspect", bundle)) == 0
    parts = {f["part"]: f["state"] for f in run_cli("doctor", "--json").document["findings"]}
    assert parts["8-bit instructions"].startswith("none; ")
    assert count_notes(run_cli("check", int8_bundle)) == 1


def test_calibrate_reports_it_once(without_dot_products, bundle, photos, tmp_path, run_cli):
    assert count_notes(run_cli("calibrate", bundle, "--images", photos, "-o", tmp_path / "int8", "--force")) == 1


def test_nothing_is_reported_if_int8_is_fast(monkeypatch):
    monkeypatch.setattr("phreg_deploy.runtime.backends.instructions.eight_bits", lambda: EightBits(("AVX-VNNI",)))
    assert advice("int8") is None


@x86
def test_the_probe_agrees_with_the_flags():
    from phreg_deploy.runtime.backends.openvino_exact import saturates

    pytest.importorskip("openvino")
    assert saturates() == eight_bits().missing
