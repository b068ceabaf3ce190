"""Fixtures for tests on the fake GPU: the GPU, its TensorRT and ONNX Runtime, and bundles with engines."""

import shutil
import sys
from pathlib import Path

import pytest

from phreg_deploy.runtime import FeatureExtractor
from tests import fake_gpu
from tests.fake_onnxruntime import make_onnxruntime


@pytest.fixture
def device(monkeypatch):
    """A fake GPU; the test fails if anything on it was undefined behaviour."""
    device = fake_gpu.Device()
    fake_gpu.install(monkeypatch, device)
    yield device
    assert device.undefined == []


@pytest.fixture
def all_freed(device):
    """Assert after the test that nothing is left allocated on the fake GPU."""
    yield
    assert device.live() == {}


@pytest.fixture
def tensorrt(device, monkeypatch):
    """The TensorRT of the fake GPU."""
    tensorrt = fake_gpu.FakeTensorRT(device)
    fake_gpu.install(monkeypatch, device, tensorrt)
    return tensorrt


@pytest.fixture
def onnxruntime_gpu(device, monkeypatch):
    """An ``onnxruntime`` with providers for the fake GPU."""
    module = make_onnxruntime(device)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


@pytest.fixture(scope="session")
def fp16_bundle(tmp_path_factory, student) -> Path:
    """The student in FP16, in which attention is fused."""
    from phreg_deploy.export import export

    folder = tmp_path_factory.mktemp("bundles") / "fp16"
    assert export(str(student), folder, precision="fp16").folder == folder
    return folder


@pytest.fixture(scope="session")
def int8_trt_bundle(tmp_path_factory, bundle, photos) -> Path:
    """The student in INT8 for TensorRT."""
    from phreg_deploy.calibration import calibrate

    folder = tmp_path_factory.mktemp("bundles") / "int8-trt"
    calibrate(bundle, photos, folder, target="trt")
    return folder


@pytest.fixture(scope="session")
def listed_bundle(tmp_path_factory, student) -> Path:
    """The student at two sizes, one or two images, in FP16."""
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    folder = tmp_path_factory.mktemp("bundles") / "listed"
    export_bundle(ExportRequest(str(student), image_size="64,48x96", batch="1:1:2", precision="fp16"), folder)
    return folder


@pytest.fixture
def copy_bundle(request, tmp_path):
    """``copy_bundle(name)`` copies a fixture's bundle, so that an engine can be written into it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(request.getfixturevalue(name), tmp_path / name))

    return copy


@pytest.fixture
def load_engine(tensorrt, copy_bundle):
    """``load_engine(name)`` copies a fixture's bundle, builds its engine and opens it; closed after the test."""
    from phreg_deploy.export.engine.build import BuildRequest, build_engine

    opened = []

    def load(name: str) -> FeatureExtractor:
        folder = copy_bundle(name)
        build_engine(BuildRequest(folder, check=False))
        opened.append(FeatureExtractor.load(folder, "tensorrt"))
        return opened[-1]

    yield load
    for extractor in opened:
        extractor.close()


@pytest.fixture
def on_cpu(request):
    """``on_cpu(name, batch)`` runs a fixture's bundle on the processor with ONNX Runtime."""
    opened = {}

    def run(name, batch):
        if name not in opened:
            opened[name] = FeatureExtractor.load(request.getfixturevalue(name), "onnxruntime-cpu", threads=1)
        return opened[name].run(batch)

    return run
