"""`phreg-deploy build` and `export --format trt` write engines that serve, on a fake GPU and a fake TensorRT."""

import json
from pathlib import Path

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.plans import list_plans
from phreg_deploy.export import build as build_plan
from phreg_deploy.runtime import FeatureExtractor
from tests import fake_gpu
from tests.build_helpers import build, plan_files
from tests.cli_helpers import invoke, leftovers, run_python

pytestmark = pytest.mark.usefixtures("all_freed")

BLOCKED = ("torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision")


@pytest.mark.parametrize("name", ["bundle", "wide_bundle", "fp16_bundle"])
def test_an_engine_and_its_sidecar_are_written_and_serve(copy_bundle, name, tensorrt):
    folder = copy_bundle(name)
    done = build(folder)
    assert done.code == 0, done.err
    report = done.document
    (sidecar, plan) = plan_files(folder)
    assert report["engine"] == str(folder / "engines" / plan)
    assert report["cached"] is False
    assert report["missed"] == report["short"] == []
    assert report["warnings"] == ["the fake is slower than a GPU"]
    assert report["census"]["fused_attention"] == (
        [f"blocks.{i}.attn" for i in range(3)] if name == "fp16_bundle" else []
    )
    stored = json.loads((folder / "engines" / sidecar).read_text())
    assert stored["report"]["parity"] == report["parity"]
    assert stored["key"]["gpu"] == "NVIDIA Fake, 16 multiprocessors"
    assert leftovers(folder) == []
    Bundle.read(folder).verify()
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        assert extractor(np.zeros((64, 64, 3), np.uint8)).features.shape == (1, 8, 8, 48)


def test_the_table_describes_the_engine(copy_bundle, tensorrt):
    done = invoke("build", copy_bundle("fp16_bundle"))
    assert done.code == 0
    assert "Engine for NVIDIA Fake, 16 multiprocessors (SM 8.9), TensorRT 10.16.1" in " ".join(done.out.split())
    assert "3 blocks" in done.out
    assert "Next: phreg-deploy profile" in done.out
    assert "Traceback" not in done.err


def test_float32_is_built_without_tf32(copy_bundle, tensorrt):
    assert build(copy_bundle("bundle")).code == 0
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
def test_every_option_reaches_tensorrt(copy_bundle, tensorrt, words, check):
    folder = copy_bundle("bundle")
    assert build(folder, *words).code == 0
    (config,) = tensorrt.builds
    assert check(config, tensorrt.module)
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        assert extractor.backend == "tensorrt"


def test_the_second_build_finds_the_engine(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
    first, second = build(folder).document, build(folder)
    assert second.code == 0
    assert second.document["cached"] is True
    assert {**second.document, "cached": False} == first
    assert len(tensorrt.builds) == 1
    assert "It was there already" in invoke("build", folder).out


def test_the_function_returns_what_the_command_prints(copy_bundle, tensorrt):
    folder = copy_bundle("fp16_bundle")
    report = build_plan(folder, effort=2)
    assert report.plan.name in plan_files(folder)
    assert report.key.settings.effort == 2
    assert report.census.fused_attention == tuple(f"blocks.{i}.attn" for i in range(3))
    assert report.cosine_p1 > 0.999
    printed = build(folder, "--effort", "2").document
    assert printed == json.loads(json.dumps({**report.to_json(), "cached": True, "bundle": str(folder)}))


def test_force_builds_again(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
    build(folder)
    done = build(folder, "--force")
    assert (done.code, done.document["cached"]) == (0, False)
    assert len(tensorrt.builds) == 2
    assert len(plan_files(folder)) == 2


def test_other_settings_are_another_engine_beside_the_first(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
    assert build(folder).code == build(folder, "--effort", 4).code == 0
    assert len(plan_files(folder)) == 4


def test_gpus_of_one_architecture_share_a_bundle(copy_bundle, device, tensorrt):
    """Both are SM 8.9, but each has its own engine and timing cache."""
    folder = copy_bundle("bundle")
    assert build(folder).code == 0
    device.name = "NVIDIA Other"
    assert build(folder).code == 0
    assert len(plan_files(folder)) == 4


def test_a_portable_engine_runs_on_a_later_tensorrt(copy_bundle, device, tensorrt, monkeypatch):
    folder = copy_bundle("bundle")
    assert build(folder, "--compat", "version").code == 0
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device, "10.17.0"))
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        assert extractor(np.zeros((64, 64, 3), np.uint8)).features.shape == (1, 8, 8, 48)


def test_the_engine_that_was_built_last_is_served(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
    paths = {effort: build(folder, "--effort", effort).document["engine"] for effort in ("2", "5")}

    def served():
        with FeatureExtractor.load(folder, "tensorrt") as extractor:
            return str(extractor.opened.plan.path)

    assert served() == paths["5"]
    assert build(folder, "--effort", "2").document["cached"] is True
    assert served() == paths["2"]


def test_the_timing_cache_is_written_and_read(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
    build(folder)
    (cache,) = (folder / "engines").glob("*.cache")
    written = cache.read_bytes()
    assert written.startswith(b"timings of NVIDIA Fake")
    build(folder, "--force")
    assert tensorrt.builds[1]._cache._data == written
    assert Bundle.read(folder).verify() is None


def test_a_given_timing_cache_is_written_and_read(copy_bundle, tensorrt, tmp_path):
    folder, cache = copy_bundle("bundle"), tmp_path / "mine.cache"
    assert build(folder, "--timing-cache", cache).code == 0
    written = cache.read_bytes()
    assert list((folder / "engines").glob("*.cache")) == []
    assert build(folder, "--force", "--timing-cache", cache).code == 0
    assert cache.read_bytes() == written


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


@pytest.mark.parametrize("name", ["wide_bundle", "fp16_bundle", "int8_trt_bundle"])
def test_build_runs_without_torch_and_onnx(copy_bundle, name):
    folder = copy_bundle(name)
    outcome = json.loads(run_python(ALONE, ",".join(BLOCKED), folder).splitlines()[-1])
    assert (outcome["code"], outcome["heavy"], outcome["live"], outcome["missed"]) == (0, [], {}, []), outcome
    assert len(plan_files(folder)) == 2
