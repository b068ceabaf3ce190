"""`phreg-deploy profile` on a fake GPU (``tests/fake_gpu``): it measures, gathers and prints every figure."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest

from phreg_deploy.profiling import profiler
from phreg_deploy.progress import SILENT
from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import invoke
from tests.fake_sensors import FakeNvml
from tests.frames import random_frames


@pytest.fixture
def gpu(device, tensorrt, monkeypatch, tmp_path):
    monkeypatch.setattr("phreg_deploy.profiling.profiler.pci_of", lambda _: "0000:01:00.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("phreg_deploy.profiling.device.peaks.COPIED", 1 << 20)
    monkeypatch.setattr("phreg_deploy.export.engine.gemm.SIDE", 64)
    # Seconds of idling change no test.
    monkeypatch.setattr("phreg_deploy.profiling.device.telemetry.Telemetry.measure_idle", lambda *_: None)
    yield device
    assert device.live() == {}


@pytest.fixture
def built(gpu, wide_bundle, tmp_path):
    folder = shutil.copytree(wide_bundle, tmp_path / "wide")
    assert invoke("build", folder, "--json").code == 0
    return folder


def test_profile_reports_parts_streams_layers_and_a_roofline(built):
    done = invoke(
        "profile",
        built,
        "--backend",
        "tensorrt",
        "--batch",
        "1,2",
        "--seconds",
        "0.2",
        "--streams",
        "1,2",
        "--fps",
        "50",
        "--json",
    )
    assert done.code == 0, done.err[-600:]
    report = done.document["gpu"]
    assert {(r["batch"], r["graph"]) for r in report["results"]} == {(b, g) for b in (1, 2) for g in (False, True)}
    for result in report["results"]:
        for part in ("latency", "h2d", "enqueue", "compute", "d2h"):
            found = result[part]
            assert (
                0
                <= found["min"]
                <= found["p50"]
                <= found["p90"]
                <= found["p95"]
                <= found["p99"]
                <= found["p99.9"]
                <= found["max"]
            )
        parts = sum(result[part]["mean"] for part in ("h2d", "compute", "d2h"))
        assert result["latency"]["mean"] == pytest.approx(parts, rel=1e-6)
    assert {(s["batch"], s["streams"]) for s in report["streams"]} == {(b, s) for b in (1, 2) for s in (1, 2)}
    assert report["peaks"]["precision"] == "fp32"
    assert report["peaks"]["flops"] > 0
    assert report["peaks"]["bandwidth"] > 0
    assert len(report["roofline"]) == len(report["queue"]) == 2
    assert report["layers"][0]["parts"]
    assert done.document["conditions"]["backend"] == "tensorrt"
    for words in ("CUDA graph", "Threads that call at once", "Layers at batch 1"):
        assert words in done.err


@pytest.fixture
def nvml(gpu, monkeypatch):
    """A fake NVML beside the fake GPU; ``nvml.reasons`` are the bits of what holds it back."""
    nvml = FakeNvml()
    nvml.reasons = 0
    nvml._CurrentClocksEventReasons = lambda _gpu: nvml.reasons
    nvml.most = 1980
    nvml._MaxClockInfo = lambda _gpu, _kind: nvml.most
    nvml._MemoryInfo = lambda _gpu: SimpleNamespace(used=1 << 30)
    real = profiler.Telemetry
    monkeypatch.setattr(profiler, "Telemetry", lambda index, pci: real(index, pci=pci, nvml=nvml))
    return nvml


QUICK = ["--backend", "tensorrt", "--seconds", "0.1", "--streams", "2", "--json"]


def test_throttling_and_energy_are_told_of_every_measurement(built, nvml):
    nvml.reasons = 0x20
    done = invoke("profile", built, *QUICK, "--fps", "50", "--scenario", "offline")
    assert done.code == 0, done.err[-600:]
    watched = {entry["measurement"]: entry["telemetry"] for entry in done.document["gpu"]["watched"]}
    assert set(watched) == {"extractor", "latency", "2 threads", "layers", "paced", "offline"}
    for name, found in watched.items():
        assert found["throttled"] == {"software thermal slowdown": 1.0}, name
        assert f"THROTTLED: {name} at batch" in done.err
        assert found["energy"]["joules"] > 0
        assert (found["energy"]["per_frame"] is None) == (name == "extractor")
    assert "What the GPU did meanwhile" in done.err
    nvml.reasons = 0x1
    assert "THROTTLED" not in invoke("profile", built, *QUICK).err, "an idle GPU is not held back"


def test_a_baseline_of_other_clocks_or_throttling_is_told_apart(built, nvml, tmp_path):
    before = invoke("profile", built, *QUICK)
    (tmp_path / "before.json").write_text(before.out)
    words = ["profile", built, *QUICK, "--tolerance", "100", "--baseline", tmp_path / "before.json"]
    assert invoke(*words).document["baseline"]["differences"] == []
    nvml.reasons, nvml._ClockInfo = 0x4, lambda _gpu, kind: {1: 1200, 2: 9000}[kind]
    differences = invoke(*words).document["baseline"]["differences"]
    assert differences == [
        "mean SM clock under load: 1500 MHz in the baseline, 1200 MHz now",
        "throttled: not at all in the baseline, software power cap now",
    ]
    nvml.most = 1410
    invoke(*words).refused(2, "other conditions", "clocks: sm clock 1980.0 in the baseline, sm clock 1410.0 now")


def test_a_baseline_of_another_driver_or_gpu_is_refused(built, gpu, tmp_path):
    before = invoke("profile", built, *QUICK)
    words = ["profile", built, *QUICK, "--baseline", tmp_path / "before.json"]
    for name, value, said in (
        ("driver", 12060, "driver: 12060 in the"),
        ("gpu", "Orin, 8 multiprocessors", "gpu: Orin"),
    ):
        report = copy.deepcopy(before.document)
        report["conditions"][name] = value
        (tmp_path / "before.json").write_text(json.dumps(report))
        invoke(*words).refused(2, "other conditions", said)


def test_peaks_are_measured_once(built, tensorrt):
    first = invoke("profile", built, *QUICK).document["gpu"]["peaks"]
    built_before = len(tensorrt.builds)
    again = invoke("profile", built, *QUICK).document["gpu"]["peaks"]
    assert len(tensorrt.builds) == built_before
    assert (again["flops"], again["bandwidth"]) == (first["flops"], first["bandwidth"])
    assert "from an earlier run" in again["note"]


def test_every_context_is_made_and_warm_before_a_sweep_is_measured(built, gpu, tensorrt, monkeypatch):
    """In the window no context is created, no graph recorded, and no memory allocated."""
    from phreg_deploy.profiling import load

    begin, started = load._Streams._begin, []

    def marked(self):
        started.append(len(gpu.calls))
        begin(self)

    monkeypatch.setattr(load._Streams, "_begin", marked)
    with FeatureExtractor.load(built, "tensorrt") as extractor:
        batch = random_frames(1, 1, (64, 64))
        plan = extractor.opened
        for threads in (4, 2):
            contexts = plan.reserve(threads)
            assert contexts == 4
            load.sweep(lambda: extractor.run(batch), threads, 0.05, SILENT, contexts=contexts)
            names = {name for name, _ in gpu.calls[started.pop() :]}
            assert not names & {"cudaMalloc", "cudaMallocHost", "cudaStreamBeginCapture", "cudaStreamCreateWithFlags"}
            assert len(plan._contexts) == 4


def test_the_cost_of_registers_needs_a_bundle_without_them(built, gpu):
    done = invoke(
        "profile", built, "--backend", "tensorrt", "--seconds", "0.1", "--streams", "1", "--without", built, "--json"
    )
    done.refused(2, "the one with more registers first")


@pytest.mark.parametrize("option", [("--fps", "30"), ("--without", "x.bundle")])
def test_options_for_a_gpu_are_refused_without_one(bundle, option):
    invoke("profile", bundle, "--backend", "onnxruntime-cpu", "--seconds", "0.1", *option, "--json").refused(
        2, "are for a GPU"
    )
