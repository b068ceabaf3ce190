"""`phreg-deploy build` and `export --format trt`, on a GPU and a TensorRT that are not there (``tests/fake_gpu``)."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.plans import list_plans
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.export import build as build_plan
from phreg_deploy.export import export
from phreg_deploy.runtime import FeatureExtractor
from tests import fake_gpu
from tests.cli_helpers import ROOT, invoke, leftovers

BLOCKED = ("torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision")


@pytest.fixture
def device(device):
    """The fake GPU, on which nothing may be left allocated."""
    yield device
    assert device.live() == {}


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory, student) -> Path:
    """The student in FP16, in which attention is fused."""
    folder = tmp_path_factory.mktemp("bundles") / "half"
    assert export(str(student), folder, precision="fp16").folder == folder
    return folder


@pytest.fixture(scope="module")
def eight_trt(tmp_path_factory, bundle, photos) -> Path:
    """The student in 8 bits as TensorRT takes them."""
    from phreg_deploy.calibration import calibrate

    folder = tmp_path_factory.mktemp("bundles") / "eight-trt"
    calibrate(bundle, photos, folder, target="trt")
    return folder


@pytest.fixture
def copy(request, tmp_path):
    """A function that copies a fixture's bundle, to write an engine into."""

    def make(name):
        return Path(shutil.copytree(request.getfixturevalue(name), tmp_path / name))

    return make


def plan_files(folder):
    """Return the names of the plans and sidecars in ``engines/``."""
    return sorted(p.name for p in (folder / "engines").glob("*") if p.suffix in (".plan", ".json"))


def build(folder, *words):
    return invoke("build", folder, *words, "--json")


# What is built


@pytest.mark.parametrize("name", ["bundle", "wide_bundle", "half_bundle"])
def test_an_engine_and_its_sidecar_are_written_and_serve(copy, name, tensorrt):
    folder = copy(name)
    done = build(folder)
    assert done.code == 0, done.err
    report = done.document
    (sidecar, plan) = plan_files(folder)
    assert report["engine"] == str(folder / "engines" / plan)
    assert report["cached"] is False
    assert report["missed"] == report["short"] == []
    assert report["warnings"] == ["the fake is slower than a GPU"]
    assert report["census"]["fused_attention"] == (
        [f"blocks.{i}.attn" for i in range(3)] if name == "half_bundle" else []
    )
    stored = json.loads((folder / "engines" / sidecar).read_text())
    assert stored["report"]["parity"] == report["parity"]
    assert stored["key"]["gpu"] == "NVIDIA Fake"
    assert leftovers(folder) == []
    Bundle.read(folder).verify()
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        assert extractor(np.zeros((64, 64, 3), np.uint8)).features.shape == (1, 8, 8, 48)


def test_the_table_says_what_was_built(copy, tensorrt):
    done = invoke("build", copy("half_bundle"))
    assert done.code == 0
    assert "Engine for NVIDIA Fake (SM 8.9), TensorRT 10.16.1" in done.out
    assert "3 blocks" in done.out
    assert "Next: phreg-deploy profile" in done.out
    assert "Traceback" not in done.err


def test_a_plan_is_built_with_float32_that_stays_float32(copy, tensorrt):
    assert build(copy("bundle")).code == 0
    (config,) = tensorrt.builds
    assert config._flags == set()
    assert config._pools == {}
    assert config.builder_optimization_level == 3
    assert config.profiling_verbosity == tensorrt.module.ProfilingVerbosity.DETAILED


@pytest.mark.parametrize(
    ("words", "check"),
    [
        (["--tf32"], lambda c, t: c._flags == {t.BuilderFlag.TF32}),
        (["--workspace", 1024], lambda c, t: c._pools == {"WORKSPACE": 1024 * 2**20}),
        (["--effort", 5], lambda c, t: c.builder_optimization_level == 5),
        (["--compat", "version"], lambda c, t: c._flags == {t.BuilderFlag.VERSION_COMPATIBLE}),
        (
            ["--compat", "ampere+"],
            lambda c, t: c.hardware_compatibility_level == t.HardwareCompatibilityLevel.AMPERE_PLUS,
        ),
        (["--compat", "same-cc"], lambda c, t: c.hardware_compatibility_level.name == "SAME_COMPUTE_CAPABILITY"),
    ],
)
def test_every_option_reaches_tensorrt(copy, tensorrt, words, check):
    folder = copy("bundle")
    assert build(folder, *words).code == 0
    (config,) = tensorrt.builds
    assert check(config, tensorrt.module)
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        assert extractor.backend == "tensorrt"


def test_the_second_build_finds_the_engine(copy, tensorrt):
    folder = copy("bundle")
    first, second = build(folder).document, build(folder)
    assert second.code == 0
    assert second.document["cached"] is True
    assert {**second.document, "cached": False} == first
    assert len(tensorrt.builds) == 1
    assert "It was there already" in invoke("build", folder).out


def test_the_function_returns_what_the_command_prints(copy, tensorrt):
    folder = copy("half_bundle")
    report = build_plan(folder, effort=2)
    assert report.plan.name in plan_files(folder)
    assert report.key.settings.effort == 2
    assert report.census.fused_attention == tuple(f"blocks.{i}.attn" for i in range(3))
    assert report.cosine_p1 > 0.999
    printed = build(folder, "--effort", "2").document
    assert printed == json.loads(json.dumps({**report.to_json(), "cached": True, "bundle": str(folder)}))


def test_force_builds_again(copy, tensorrt):
    folder = copy("bundle")
    build(folder)
    done = build(folder, "--force")
    assert (done.code, done.document["cached"]) == (0, False)
    assert len(tensorrt.builds) == 2
    assert len(plan_files(folder)) == 2


def test_other_settings_are_another_engine_beside_the_first(copy, tensorrt):
    folder = copy("bundle")
    assert build(folder).code == build(folder, "--effort", 4).code == 0
    assert len(plan_files(folder)) == 4


# What is refused


def test_a_damaged_plan_is_not_run(copy, tensorrt):
    folder = copy("bundle")
    plan = Path(build(folder).document["engine"])
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    build(folder).refused(2, "was changed or damaged, and is not run", f"phreg-deploy build {folder} --force")
    with pytest.raises(PhregError, match="is not run"):
        FeatureExtractor.load(folder, "tensorrt")
    assert build(folder, "--force").code == 0
    FeatureExtractor.load(folder, "tensorrt").close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "NVIDIA Other"}, "for NVIDIA Fake (SM 8.9), and this is NVIDIA Other (SM 8.9)"),
        ({"architecture": 90}, "and this is NVIDIA Fake (SM 9.0)"),
        ({"driver": 12060}, "with CUDA 13, and this is CUDA 12"),
    ],
)
def test_an_engine_of_another_machine_is_refused_with_the_command(copy, device, tensorrt, change, words):
    folder = copy("bundle")
    build(folder)
    for name, value in change.items():
        setattr(device, name, value)
    with pytest.raises(BackendMissing) as caught:
        FeatureExtractor.load(folder, "tensorrt")
    assert words in str(caught.value)
    assert f"phreg-deploy build {folder}" in str(caught.value)
    assert build(folder).code == 0
    FeatureExtractor.load(folder, "tensorrt").close()


def test_gpus_of_one_architecture_share_a_bundle(copy, device, tensorrt):
    """They have separate timings, though both are SM 8.9."""
    folder = copy("bundle")
    assert build(folder).code == 0
    device.name = "NVIDIA Other"
    assert build(folder).code == 0
    assert len(plan_files(folder)) == 4


def test_a_portable_engine_runs_on_a_later_tensorrt(copy, device, tensorrt, monkeypatch):
    folder = copy("bundle")
    assert build(folder, "--compat", "version").code == 0
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device, "10.17.0"))
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        assert extractor(np.zeros((64, 64, 3), np.uint8)).features.shape == (1, 8, 8, 48)


def test_an_engine_of_another_tensorrt_is_refused(copy, device, tensorrt, monkeypatch):
    folder = copy("bundle")
    assert build(folder).code == 0
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device, "10.17.0"))
    with pytest.raises(BackendMissing, match=r"with TensorRT 10\.16\.1, and this is 10\.17\.0"):
        FeatureExtractor.load(folder, "tensorrt")


def test_an_old_tensorrt_says_which_compatibility_it_lacks(copy, device, monkeypatch):
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device, "10.3.0"))
    build(copy("bundle"), "--compat", "same-cc").refused(2, "got same-cc, which TensorRT 10.3.0 does not have")


def test_a_tensorrt_that_is_too_old_is_refused(copy, device, monkeypatch):
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device, "10.0.1"))
    build(copy("bundle")).refused(4, "got 10.0.1, expected at least 10.3")


def test_unfused_attention_is_not_kept(copy, tensorrt):
    folder, tensorrt.unfused_blocks = copy("half_bundle"), {1}
    done = build(folder)
    done.refused(3, "2 of 3 attentions are fused", "--allow-unfused")
    assert done.document["census"]["fused_attention"] == ["blocks.0.attn", "blocks.2.attn"]
    assert plan_files(folder) == []


def test_unfused_attention_is_kept_if_allowed(copy, tensorrt):
    folder, tensorrt.unfused_blocks = copy("half_bundle"), {1}
    done = build(folder, "--allow-unfused")
    assert done.code == 0
    assert done.document["short"] == ["2 of 3 attentions are fused"]
    assert len(plan_files(folder)) == 2
    assert "Missed: 2 of 3 attentions are fused." in invoke("build", folder).out


def test_eight_bit_layers_are_counted(copy, tensorrt):
    folder = copy("eight_trt")
    done = build(folder)
    assert done.code == 0, done.err
    layers = json.loads((folder / "calibration.json").read_text())["layers"]
    expected = {layer["name"] for layer in layers if layer["precision"] != "float"}
    assert expected <= set(done.document["census"]["eight_bit"])
    assert len(done.document["census"]["fused_attention"]) == 3


def test_an_engine_that_lacks_eight_bit_layers_is_not_kept(copy, tensorrt):
    folder, tensorrt.float_layers = copy("eight_trt"), {"blocks.1.mlp.fc2"}
    build(folder).refused(3, "linear layers that were meant to run in 8 bits run in float, e.g. blocks.1.mlp.fc2")
    assert plan_files(folder) == []


def test_eight_bits_for_the_processor_are_refused_with_the_command(copy, tensorrt):
    build(copy("eight")).refused(2, "was calibrated for the processor", "--target trt")


@pytest.mark.parametrize("name", ["bundle", "wide_bundle"])
def test_an_engine_that_answers_wrongly_is_not_kept(copy, tensorrt, name):
    folder, tensorrt.zeroed_weights = copy(name), "blocks.1.mlp.fc1.weight"
    done = build(folder)
    done.refused(3, "parity:", "The engine was not kept", "--bisect")
    assert done.document["missed"]
    assert plan_files(folder) == []
    assert leftovers(folder) == []


def test_force_keeps_an_engine_that_answers_wrongly_and_says_so(copy, tensorrt):
    folder, tensorrt.zeroed_weights = copy("bundle"), "blocks.1.mlp.fc1.weight"
    done = build(folder, "--force")
    assert done.code == 0
    assert done.document["missed"]
    assert len(plan_files(folder)) == 2
    assert "Missed: 1st-percentile patch cosine" in invoke("build", folder).out


def test_an_engine_that_was_good_stays_when_a_forced_one_is_refused(copy, tensorrt):
    folder = copy("half_bundle")
    build(folder)
    before = [(folder / "engines" / name).read_bytes() for name in plan_files(folder)]
    tensorrt.unfused_blocks = {0}
    build(folder, "--force").refused(3, "attentions are fused")
    assert [(folder / "engines" / name).read_bytes() for name in plan_files(folder)] == before


def test_an_engine_whose_exam_broke_off_does_not_count(copy, tensorrt):
    folder, tensorrt.fail_enqueue = copy("bundle"), 1
    build(folder).refused(2, "could not start the inference")
    assert plan_files(folder) == []
    assert build(folder).document["cached"] is False


def test_an_engine_whose_exam_was_interrupted_does_not_count(copy, tensorrt, monkeypatch):
    from phreg_deploy.export.engine import build as engine

    def ctrl_c(*_arguments):
        raise KeyboardInterrupt

    folder = copy("bundle")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "judge_exam", ctrl_c)
        build(folder).refused(130, "Interrupted")
    assert plan_files(folder) == []
    assert leftovers(folder) == []
    assert build(folder).document["cached"] is False


@pytest.mark.parametrize("where", ["nowhere/mine.cache", "."])
def test_a_timing_cache_that_cannot_be_written_is_refused_before_the_build(copy, tensorrt, tmp_path, where):
    folder = copy("bundle")
    build(folder, "--timing-cache", tmp_path / where).refused(2, "expected a file in a folder that exists")
    assert tensorrt.builds == []
    assert plan_files(folder) == []


def test_an_engine_without_exam_is_built_again_if_the_exam_is_wanted(copy, tensorrt):
    folder = copy("bundle")
    assert build(folder, "--no-check").document["cached"] is False
    assert build(folder, "--no-check").document["cached"] is True
    again = build(folder).document
    assert again["cached"] is False
    assert again["parity"]["cosine_p1"] > 0.99999
    assert build(folder).document["cached"] is True


def test_the_engine_that_was_built_last_is_served(copy, tensorrt):
    folder = copy("bundle")
    paths = {effort: build(folder, "--effort", effort).document["engine"] for effort in ("2", "5")}

    def served():
        with FeatureExtractor.load(folder, "tensorrt") as extractor:
            return str(extractor.opened.plan.path)

    assert served() == paths["5"]
    assert build(folder, "--effort", "2").document["cached"] is True
    assert served() == paths["2"]


def test_the_new_plan_is_examined_and_not_an_older_one(copy, tensorrt):
    folder = copy("bundle")
    assert build(folder, "--effort", "5").code == 0
    tensorrt.zeroed_weights = "blocks.1."
    build(folder, "--effort", "2").refused(3, "1st-percentile patch cosine")
    assert len([name for name in plan_files(folder) if name.endswith(".plan")]) == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"report": {}},
        {"report": {"census": {}}},
        {"report": {"parity": 3}},
        {"profiles": []},
        {"profiles": [{"inputs": {"image": 3}}]},
    ],
)
def test_a_damaged_sidecar_is_built_again(copy, tensorrt, damage):
    folder = copy("bundle")
    sidecar = Path(build(folder).document["engine"]).with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | damage))
    again = build(folder)
    assert (again.code, again.document["cached"]) == (0, False), again.err[-300:]


@pytest.mark.parametrize(
    ("precision", "architecture", "words"), [("bf16", 75, "needs SM 8.0"), ("fp8", 87, "needs SM 8.9")]
)
def test_a_gpu_without_the_precision_is_refused_before_the_build(bundle, precision, architecture, words):
    from types import SimpleNamespace

    from phreg_deploy.export.engine.build import _check_gpu

    read = Bundle.read(bundle)
    fake = SimpleNamespace(folder=read.folder, manifest=SimpleNamespace(precision=precision))
    with pytest.raises(PhregError, match=words):
        _check_gpu(fake, SimpleNamespace(name="Some GPU", architecture=architecture))
    _check_gpu(fake, SimpleNamespace(name="Some GPU", architecture=90))


def test_a_missing_onnx_does_not_hide_the_gate_that_bisect_explains(copy, tensorrt, monkeypatch):
    tensorrt.zeroed_weights = "blocks.1."
    monkeypatch.setattr(
        "phreg_deploy.verify.bisection.bisect",
        lambda *_, **__: (_ for _ in ()).throw(BackendMissing("needs the module 'onnx'")),
    )
    done = build(copy("bundle"), "--bisect")
    done.refused(3, "1st-percentile patch cosine")
    assert "needs the module 'onnx'" in done.document["bisection"]["skipped"]


def test_no_check_skips_the_exam(copy, tensorrt):
    folder, tensorrt.zeroed_weights = copy("bundle"), "blocks.1.mlp.fc1.weight"
    done = build(folder, "--no-check")
    assert done.code == 0
    assert "parity" not in done.document
    assert tensorrt.runs == 0


@pytest.mark.parametrize(
    ("weight", "place"), [("blocks.1.mlp.fc1.weight", "blocks.1.mlp"), ("blocks.2.attn.qkv.weight", "blocks.2.attn")]
)
@pytest.mark.parametrize("name", ["bundle", "half_bundle"])
def test_bisect_names_the_block_that_is_wrong(copy, tensorrt, name, weight, place):
    folder, tensorrt.zeroed_weights = copy(name), weight
    done = build(folder, "--bisect")
    done.refused(3, f"The first that diverges is {place}")
    bisection = done.document["bisection"]
    assert bisection["first"] == place
    assert len(bisection["steps"]) == 6
    assert plan_files(folder) == []


def test_what_the_parser_refuses_is_named_with_its_node(copy, tensorrt):
    folder = copy("bundle")
    tensorrt.refused_node = next(
        name for name, kind, _ in fake_gpu.read_nodes((folder / "model.onnx").read_bytes()) if kind == "Gelu"
    )
    build(folder).refused(2, f"node {tensorrt.refused_node} (Gelu): no plugin and no importer for it")
    assert plan_files(folder) == []


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("Could not find any implementation for node fc1", False),
        ("Requested amount of GPU memory could not be had", True),
    ],
)
def test_a_failed_build_gives_tensorrts_reason(copy, tensorrt, reason, hint):
    folder = copy("bundle")
    real = tensorrt.module.Builder.build_serialized_network

    def fail(builder, network, config):
        builder._logger.log(tensorrt.module.ILogger.Severity.ERROR, f"{reason}\nmore")
        return None

    tensorrt.module.Builder.build_serialized_network = fail
    done = build(folder)
    done.refused(2, "builds no engine", f"{reason}.")
    assert ("--workspace" in done.err) == hint
    tensorrt.module.Builder.build_serialized_network = real
    assert build(folder).code == 0


@pytest.mark.parametrize("at", [0, 3])
def test_an_interrupted_build_leaves_nothing(copy, tensorrt, at):
    folder, steps = copy("bundle"), []

    def ctrl_c(step):
        steps.append(step)
        if step == at:
            signal.raise_signal(signal.SIGINT)

    tensorrt.on_step = ctrl_c
    before, handler = sorted(folder.rglob("*")), signal.getsignal(signal.SIGINT)
    build(folder).refused(130, "Interrupted")
    assert steps[-1] == at, "the build stopped at once"
    assert plan_files(folder) == []
    assert leftovers(folder) == []
    assert [p for p in sorted(folder.rglob("*")) if p.is_file()] == [p for p in before if p.is_file()]
    assert signal.getsignal(signal.SIGINT) is handler
    tensorrt.on_step = None
    assert build(folder).code == 0


def test_a_bar_that_cannot_be_drawn_stops_the_build(copy, tensorrt, monkeypatch):
    from phreg_deploy.progress import Bars

    def broken(*_, **__):
        raise BrokenPipeError("the terminal went away")

    folder = copy("bundle")
    monkeypatch.setattr(Bars, "update", broken)
    # As with every command whose reader went away.
    assert build(folder).code == 0
    assert plan_files(folder) == []


def test_a_full_disk_leaves_no_engine(copy, tensorrt, monkeypatch):
    import phreg_deploy.bundle.plans as module

    folder = copy("bundle")

    def full(target, data):
        raise PhregError("output: the disk is full")

    monkeypatch.setattr(module, "write_atomic", full)
    build(folder).refused(2, "the disk is full")
    assert plan_files(folder) == []


# Timing caches


def test_the_timing_cache_is_written_and_read(copy, tensorrt):
    folder = copy("bundle")
    build(folder)
    (cache,) = (folder / "engines").glob("*.cache")
    written = cache.read_bytes()
    assert written.startswith(b"timings of NVIDIA Fake")
    build(folder, "--force")
    assert tensorrt.builds[1]._cache._data == written
    assert Bundle.read(folder).verify() is None


def test_a_given_timing_cache_is_written_and_read(copy, tensorrt, tmp_path):
    folder, cache = copy("bundle"), tmp_path / "mine.cache"
    assert build(folder, "--timing-cache", cache).code == 0
    written = cache.read_bytes()
    assert list((folder / "engines").glob("*.cache")) == []
    assert build(folder, "--force", "--timing-cache", cache).code == 0
    assert cache.read_bytes() == written


def test_a_timing_cache_of_another_gpu_is_refused(copy, tensorrt, tmp_path):
    (tmp_path / "other.cache").write_bytes(b"timings of NVIDIA Other, 10.16.1\n")
    build(copy("bundle"), "--timing-cache", tmp_path / "other.cache").refused(2, "of another GPU or TensorRT")


# Without TensorRT, a GPU or PyTorch


@pytest.fixture
def no_tensorrt(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("tensorrt") else real(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


def test_without_tensorrt_build_says_what_to_install(copy, no_tensorrt):
    build(copy("bundle")).refused(4, "TensorRT: it is not installed", "phreg-deploy[trt]")


def test_without_a_gpu_build_says_so(copy, device, tensorrt):
    device.installed = 0
    build(copy("bundle")).refused(4, "no usable NVIDIA driver or GPU", "phreg-deploy doctor")


def test_where_cuda_does_not_start_build_says_so(copy, tensorrt):
    tensorrt.starts = False
    build(copy("bundle")).refused(4, "cannot build here", "CUDA initialization failure")


def test_export_without_tensorrt_leaves_a_whole_bundle(student, no_tensorrt, traced_once, tmp_path):
    output = tmp_path / "out.bundle"
    done = invoke("export", student, "-o", output, "--format", "trt", "--precision", "fp16", "--json")
    done.refused(4, "The bundle is written and checked", "run there: phreg-deploy build out.bundle")
    assert done.document["bundle"] == str(output)
    Bundle.read(output).verify()
    with FeatureExtractor.load(output, "onnxruntime-cpu") as extractor:
        assert extractor(np.zeros((64, 64, 3), np.uint8)).features.shape == (1, 8, 8, 48)
    assert leftovers(tmp_path) == []


def test_export_builds_the_engine(student, tensorrt, traced_once, tmp_path):
    output = tmp_path / "out.bundle"
    done = invoke("export", student, "-o", output, "--format", "onnx", "--format", "trt", "--json")
    assert done.code == 0, done.err
    assert done.document["engine"]["cached"] is False
    assert [e.path for e in list_plans(Bundle.read(output))] == [Path(done.document["engine"]["engine"])]
    Bundle.read(output).verify()


ALONE = """
import json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import phreg_deploy.runtime.gpu.cuda as cuda
from tests import fake_gpu
from tests.cli_helpers import invoke
device = fake_gpu.Device()
cuda._load = lambda: device.runtime
sys.modules["tensorrt"] = fake_gpu.FakeTensorRT(device).module
done = invoke("build", sys.argv[2], "--json")
heavy = [n for n in sys.argv[1].split(",") if sys.modules.get(n) is not None]
missed = done.document.get("missed")
print(json.dumps({"code": done.code, "err": done.err[-800:], "heavy": heavy, "live": device.live(), "missed": missed}))
"""


@pytest.mark.parametrize("name", ["wide_bundle", "half_bundle", "eight_trt"])
def test_build_runs_without_torch_and_onnx(copy, name):
    folder = copy(name)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE, ",".join(BLOCKED), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert (outcome["code"], outcome["heavy"], outcome["live"], outcome["missed"]) == (0, [], {}, []), outcome
    assert len(plan_files(folder)) == 2
