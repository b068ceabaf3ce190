"""Fixtures for tests on the fake GPU, its TensorRT and ONNX Runtime, bundles with engines, and a fake Jetson."""

import shutil
import sys
from pathlib import Path

import pytest

from phreg_deploy.runtime import FeatureExtractor
from tests import fake_gpu
from tests.fake_onnxruntime import make_onnxruntime
from tests.fake_sensors import ORIN_NX, power_rails, write_files


@pytest.fixture
def device(monkeypatch):
    """A fake GPU; the test fails if anything on it was undefined behaviour."""
    device = fake_gpu.Device()
    fake_gpu.install(monkeypatch, device)
    yield device
    assert device.undefined == []
    assert device.memory.check_freed() == 0, "freed memory was written to"


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
def fp16_bundle(made_once, student) -> Path:
    """The student in FP16, in which attention is fused."""
    from phreg_deploy.export import export

    return made_once("fp16", lambda folder: export(str(student), folder, precision="fp16"))


@pytest.fixture(scope="session")
def int8_trt_bundle(made_once, bundle, photos) -> Path:
    """The student in INT8 for TensorRT."""
    from phreg_deploy.calibration import calibrate

    return made_once("int8-trt", lambda folder: calibrate(bundle, photos, folder, target="trt"))


@pytest.fixture(scope="session")
def listed_bundle(made_once, student) -> Path:
    """The student at two sizes, one or two images, in FP16."""
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    request = ExportRequest(str(student), image_size="64,48x96", batch="1:1:2", precision="fp16")
    return made_once("listed", lambda folder: export_bundle(request, folder))


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


@pytest.fixture
def orin(tmp_path):
    """The root of a fake Jetson Orin NX's files."""
    zone, cooling = "sys/class/thermal/thermal_zone", "sys/class/thermal/cooling_device"
    gpu = "sys/class/devfreq/17000000.gpu/"
    return write_files(tmp_path, {
        **power_rails(ORIN_NX),
        f"{gpu}cur_freq": 918000000, f"{gpu}min_freq": 306000000, f"{gpu}max_freq": 918000000,
        "sys/class/devfreq/15340000.vic/cur_freq": 1,
        f"{zone}0/type": "cpu-thermal", f"{zone}0/temp": 71000, f"{zone}1/type": "gpu-thermal", f"{zone}1/temp": 52500,
        f"{cooling}0/type": "pwm-fan", f"{cooling}0/cur_state": 3,
        f"{cooling}1/type": "gpu-throttle-alert", f"{cooling}1/cur_state": 0,
        "sys/class/hwmon/hwmon1/oc3_event_cnt": 7,
        "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
    })  # fmt: skip
