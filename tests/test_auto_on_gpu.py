"""The backend ``auto`` on a machine with a GPU: which backends it tries, and which it takes."""

import importlib

import pytest

from phreg_deploy.export.engine.build import BuildRequest, build_engine
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.backends import registry as backends
from tests import fake_gpu


@pytest.fixture
def driver(monkeypatch):
    """``driver(True)`` makes the registry find a driver; ``driver(False)`` makes it find none."""
    return lambda there: monkeypatch.setattr(backends, "driver_present", lambda: there)


def test_without_a_driver_no_gpu_is_tried(bundle, driver, device, monkeypatch):
    driver(False)
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device))
    assert not set(backends.installed()) & set(backends.GPU)
    with FeatureExtractor.load(bundle) as extractor:
        assert "tensorrt" not in extractor.choice
        assert "cuda" not in extractor.choice
    assert device.calls == []


def test_with_a_driver_every_backend_is_tried_except_the_one_that_builds_engines(driver, device, monkeypatch):
    driver(True)
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device))
    found = backends.installed()
    assert {"tensorrt", "onnxruntime-cuda", "onnxruntime-cpu"} <= set(found)
    assert "onnxruntime-tensorrt" not in found


def test_auto_explains_why_a_gpu_was_not_taken(bundle, driver, device, monkeypatch):
    driver(True)
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device))
    with FeatureExtractor.load(bundle) as extractor:
        assert extractor.backend in ("onnxruntime-cpu", "openvino")
        assert f"phreg-deploy build {bundle}" in extractor.choice
        assert "onnxruntime-cuda does not serve it" in extractor.choice
    assert device.live() == {}


def test_auto_takes_the_gpu_where_it_is_the_fastest(copy_bundle, driver, device, monkeypatch):
    driver(True)
    tensorrt = fake_gpu.FakeTensorRT(device)
    fake_gpu.install(monkeypatch, device, tensorrt)
    folder = copy_bundle("bundle")
    build_engine(BuildRequest(folder))
    choice = importlib.import_module("phreg_deploy.runtime.auto")
    times = {"tensorrt": 1.0}

    def measure(candidate, feed, rivals):
        candidate.milliseconds = times.get(candidate.name, 9.0)
        return candidate.milliseconds

    monkeypatch.setattr(choice, "_measure", measure)
    with FeatureExtractor.load(folder) as extractor:
        assert extractor.backend == "tensorrt"
        assert extractor.choice.startswith("tensorrt: ")
        assert "tensorrt (fp32) 1.0 ms" in extractor.choice
    times["tensorrt"] = 99.0
    with FeatureExtractor.load(folder) as extractor:
        assert extractor.backend != "tensorrt"
    assert device.live() == {}, "backends that were tried and not taken are closed"


def test_auto_does_not_take_an_engine_that_fails_the_exam(copy_bundle, driver, device, monkeypatch):
    driver(True)
    tensorrt = fake_gpu.FakeTensorRT(device)
    fake_gpu.install(monkeypatch, device, tensorrt)
    folder, tensorrt.zeroed_weights = copy_bundle("bundle"), "blocks.1.mlp.fc1.weight"
    build_engine(BuildRequest(folder, check=False))
    with FeatureExtractor.load(folder) as extractor:
        assert extractor.backend != "tensorrt"
        assert "tensorrt fails the exam (1st-percentile patch cosine" in extractor.choice
    assert device.live() == {}
