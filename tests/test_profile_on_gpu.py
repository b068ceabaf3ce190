"""`phreg-deploy profile` on a fake GPU (``tests/fake_gpu``): it measures, gathers and prints every figure."""

import shutil

import pytest

from tests.cli_helpers import invoke


@pytest.fixture
def gpu(device, tensorrt, monkeypatch, tmp_path):
    monkeypatch.setattr("phreg_deploy.profiling.profiler.pci_of", lambda _: "0000:01:00.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("phreg_deploy.profiling.device.peaks.COPIED", 1 << 20)
    monkeypatch.setattr("phreg_deploy.export.engine.gemm.SIDE", 64)
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
