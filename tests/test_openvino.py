"""The OpenVINO backend: outputs, precisions, threads and errors."""

import importlib
import sys

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.backends.openvino_exact import saturates
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import open_backend
from phreg_deploy.runtime.parity import compare_runs, missed_gates, run_exam
from tests.frames import random_frames
from tests.threads import run_in_threads

openvino = pytest.importorskip("openvino")

backend_module = importlib.import_module("phreg_deploy.runtime.backends.openvino_backend")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
exact_kernels = pytest.mark.skipif(
    saturates(), reason="OpenVINO's 8-bit kernels saturate on this processor: test_saturation.py"
)
needs_bf16 = pytest.mark.skipif(not BF16, reason="this processor has no bfloat16 instructions")


def load(folder, backend="openvino", **tuning):
    return FeatureExtractor.load(folder, backend, **{"threads": 1, **tuning})


def without_bf16(monkeypatch):
    """A processor that has no instructions for bfloat16."""
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_arguments: ["FP32", "INT8"])


def test_float32_is_what_onnx_runtime_computes(bundle):
    with load(bundle) as extractor, load(bundle, "onnxruntime-cpu") as other:
        assert (extractor.backend, extractor.compute, extractor.precision) == ("openvino", "fp32", "fp32")
        parity = compare_runs(extractor.run(random_frames()), other.run(random_frames()))
    assert missed_gates(parity, "fp32") == []
    assert parity.relative_l2 < 1e-4
    assert parity.cls_cosine > 0.99999


@pytest.mark.parametrize("which", ["wide_bundle", "wide_int8_bundle"])
@pytest.mark.parametrize(("batch", "size"), [(1, (48, 48)), (3, (96, 56)), (4, (64, 64))])
def test_sizes_and_batches_change_from_call_to_call(request, which, batch, size):
    folder = request.getfixturevalue(which)
    with load(folder, compute="fp32") as extractor, load(folder, "onnxruntime-cpu") as other:
        for _ in range(2):
            extractor.run(random_frames(size=(56, 88)))
            parity = compare_runs(
                extractor.run(random_frames(0, batch, size)), other.run(random_frames(0, batch, size))
            )
            assert missed_gates(parity, extractor.precision, exam=True) == []


@needs_bf16
@pytest.mark.parametrize(("which", "precision"), [("bundle", "bf16"), ("int8_bundle", "int8")])
def test_bfloat16_is_held_to_its_own_gates(request, which, precision):
    with load(request.getfixturevalue(which), compute="bf16") as extractor:
        assert (extractor.compute, extractor.precision) == ("bf16", precision)
        (case,) = run_exam(extractor.bundle, extractor.run)
    assert missed_gates(case.parity, precision, exam=True) == []
    assert case.parity.relative_l2 > 1e-4, "it really is bfloat16"


@needs_bf16
def test_eight_bits_take_bfloat16_for_the_rest_where_it_is_fast(int8_bundle, monkeypatch):
    with load(int8_bundle) as extractor:
        assert extractor.compute == "bf16"
    without_bf16(monkeypatch)
    with load(int8_bundle) as extractor:
        assert extractor.compute == "fp32"


def test_bfloat16_is_refused_if_the_processor_has_none(bundle, run_cli, monkeypatch):
    without_bf16(monkeypatch)
    with load(bundle) as extractor:
        assert extractor.compute == "fp32"
    asked = ["check", bundle, "--backend", "openvino", "--compute", "bf16", "--json"]
    run_cli(*asked).refused(2, "compute: got bf16", "no instructions for", "use fp32")


@exact_kernels
@pytest.mark.parametrize("compute", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_every_eight_bit_layer_is_counted(bundle, int8_bundle, compute):
    names = {f"blocks.{i}.{part}" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    opened = open_backend(Bundle.read(int8_bundle), "openvino", BackendOptions(1, compute))
    assert opened.integer_layers == names
    assert backend_module.census(opened._model) == (names, set())
    opened.close()
    assert open_backend(Bundle.read(bundle), "openvino", BackendOptions(1)).integer_layers == set()


@exact_kernels
def test_an_eight_bit_layer_that_runs_in_float_is_an_error(int8_bundle, run_cli, monkeypatch):
    found = {"blocks.0.attn.qkv", "blocks.1.mlp.fc2"}
    monkeypatch.setattr(backend_module, "census", lambda _compiled: ({"blocks.0.mlp.fc1"}, found))
    asked = ["check", int8_bundle, "--backend", "openvino", "--json"]
    run_cli(*asked).refused(2, "runs 2 of 3 linear layers", "e.g. blocks.0.attn.qkv", "--backend onnxruntime-cpu")
    with load(int8_bundle, "auto") as extractor:
        assert extractor.backend == "onnxruntime-cpu"
        assert "openvino does not serve it (census:" in extractor.choice


@exact_kernels
def test_layers_that_calibration_kept_in_float_may_run_in_float(bundle, photos, tmp_path):
    from phreg_deploy.calibration import calibrate
    from phreg_deploy.quantisation import Smoothing

    settings = {"cosine_p1": 0.999999, "float_macs": 0.06, "smoothing": Smoothing()}
    kept = calibrate(bundle, photos, tmp_path / "int8", **settings, force=True).float_layers
    assert kept
    opened = open_backend(Bundle.read(tmp_path / "int8"), "openvino", BackendOptions(1, "fp32"))
    assert backend_module.census(opened._model)[1] == set(kept)
    assert len(opened.integer_layers) == 12 - len(kept)


@pytest.mark.parametrize("mode", ["latency", "throughput"])
@pytest.mark.parametrize("which", ["bundle", "int8_bundle"])
def test_several_threads_get_their_own_results(request, which, mode):
    batches = [random_frames(i) for i in range(6)]
    with load(request.getfixturevalue(which), threads=2, mode=mode, compute="fp32") as extractor:
        expected = [extractor.run(batch) for batch in batches]
        got = [[] for _ in batches]

        def serve(i):
            for _ in range(4):
                got[i].append(extractor.run(batches[i]))

        assert run_in_threads(serve, range(6)) == []
    for results, wanted in zip(got, expected):
        assert len(results) == 4
        for result in results:
            for name, value in wanted.items():
                np.testing.assert_array_equal(result[name], value)


def test_results_outlive_the_next_call(bundle):
    with load(bundle) as extractor:
        first = extractor.run(random_frames(1))
        before = {name: value.copy() for name, value in first.items()}
        extractor.run(random_frames(2))
        for name, value in first.items():
            np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_mode_reach_the_runtime(bundle, threads):
    for mode in ("latency", "throughput"):
        opened = open_backend(Bundle.read(bundle), "openvino", BackendOptions(threads, "fp32", mode))
        assert opened._model.get_property("INFERENCE_NUM_THREADS") == threads
        assert str(opened._model.get_property("PERFORMANCE_HINT")).rsplit(".", 1)[-1] == mode.upper()


def test_throughput_is_refused_where_it_would_be_ignored(bundle, run_cli, monkeypatch):
    asked = ["check", bundle, "--mode", "throughput", "--json"]
    run_cli(*asked, "--backend", "onnxruntime-cpu").refused(
        2, "mode: got throughput, which onnxruntime-cpu does not have", "--backend openvino"
    )
    served = run_cli(*asked)
    assert (served.code, served.document["backend"]) == (0, "openvino"), served.err
    monkeypatch.setitem(sys.modules, "openvino", None)
    run_cli(*asked).refused(2, "mode: got throughput", "phreg-deploy[openvino]")


def test_a_closed_extractor_frees_the_model(bundle):
    extractor = load(bundle)
    backend = extractor.opened
    extractor.close()
    extractor.close()
    assert backend._model is None
    with pytest.raises(PhregError, match="was closed"):
        extractor.run(random_frames())


def test_a_graph_that_openvino_cannot_load_is_refused(world, run_cli):
    from tests.bundle_changes import edit_graph, misname_operator, write_hashes

    folder = write_hashes(world.copy("bundle", model=edit_graph(misname_operator)))
    outcome = run_cli("check", folder, "--backend", "openvino", "--json")
    assert outcome.code == outcome.document["exit_code"] == 2
    assert "Traceback" not in outcome.err
    for words in (f"backend: OpenVINO {openvino.__version__}", "cannot load", "model.onnx"):
        assert words in outcome.document["error"]
    assert outcome.document["error"] == outcome.document["error"].strip()


@pytest.mark.parametrize("command", ["check", "profile"])
def test_without_openvino_the_extra_is_named(bundle, run_cli, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "openvino", None)
    outcome = run_cli(command, bundle, "--backend", "openvino", "--json")
    outcome.refused(4, "openvino", 'pip install "phreg-deploy[openvino]"')


def test_unknown_options_are_refused(bundle, run_cli):
    run_cli("check", bundle, "--compute", "fp8", "--json").refused(2, "'fp8'", "fp32")
    for wish, words in (
        ({"compute": "int4"}, "compute: got 'int4'"),
        ({"mode": "fast"}, "mode: got 'fast'"),
        ({"threads": 0}, "threads: got 0"),
    ):
        with pytest.raises(PhregError, match=words):
            FeatureExtractor.load(bundle, **wish)
