"""`phreg-deploy build` refuses other machines, old versions and missing parts, and names the command to run."""

import importlib.metadata
import sys

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests import fake_gpu
from tests.build_helpers import build, plan_files
from tests.cli_helpers import invoke, leftovers

pytestmark = pytest.mark.usefixtures("all_freed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"name": "NVIDIA Other"},
            "for NVIDIA Fake, 16 multiprocessors (SM 8.9), and this is NVIDIA Other, 16 multiprocessors (SM 8.9)",
        ),
        ({"architecture": 90}, "and this is NVIDIA Fake, 16 multiprocessors (SM 9.0)"),
        ({"multiprocessors": 8}, "and this is NVIDIA Fake, 8 multiprocessors (SM 8.9)"),
        ({"driver": 12060}, "with CUDA 13, and this is CUDA 12"),
    ],
)
def test_an_engine_of_another_machine_is_refused_with_the_command(copy_bundle, device, tensorrt, change, words):
    folder = copy_bundle("bundle")
    build(folder)
    for name, value in change.items():
        setattr(device, name, value)
    with pytest.raises(BackendMissing) as caught:
        FeatureExtractor.load(folder, "tensorrt")
    assert words in str(caught.value)
    assert f"phreg-deploy build {folder}" in str(caught.value)
    assert build(folder).code == 0
    FeatureExtractor.load(folder, "tensorrt").close()


@pytest.fixture
def wheel(monkeypatch):
    """``wheel(major)`` installs a wheel of TensorRT for this major version of CUDA."""
    real = importlib.metadata.version

    def install(major):
        def version(name):
            if name == f"tensorrt-cu{major}-bindings":
                return "10.16.1"
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


def test_an_update_of_the_driver_keeps_the_engines_of_a_wheel(copy_bundle, device, tensorrt, wheel):
    folder, device.driver = copy_bundle("bundle"), 12080
    wheel(12)
    assert build(folder).document["key"]["cuda"] == 12
    device.driver = 13000
    FeatureExtractor.load(folder, "tensorrt").close()


def test_a_wheel_for_a_newer_cuda_than_the_drivers_is_refused_with_the_command(copy_bundle, device, tensorrt, wheel):
    folder, device.driver = copy_bundle("bundle"), 12080
    wheel(13)
    said = "is built for CUDA 13, and the driver is of CUDA 12. Update the driver, or run: pip uninstall -y tensorrt "
    build(folder).refused(4, said, 'pip install "tensorrt-cu12>=10.3"')


def test_a_warning_of_tensorrt_at_loading_is_shown(copy_bundle, device, tensorrt):
    folder = copy_bundle("bundle")
    build(folder, "--compat", "ampere+")
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        assert extractor.choice == "tensorrt: as asked"
    device.multiprocessors = 8
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        assert "TensorRT warns: Using an engine plan file across different models" in extractor.choice


def test_an_engine_of_another_tensorrt_is_refused(copy_bundle, device, tensorrt, monkeypatch):
    folder = copy_bundle("bundle")
    assert build(folder).code == 0
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device, "10.17.0"))
    with pytest.raises(BackendMissing, match=r"with TensorRT 10\.16\.1, and this is 10\.17\.0"):
        FeatureExtractor.load(folder, "tensorrt")


def test_a_compatibility_that_an_old_tensorrt_lacks_is_refused(copy_bundle, device, monkeypatch):
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device, "10.3.0"))
    build(copy_bundle("bundle"), "--compat", "same-cc").refused(2, "got same-cc, which TensorRT 10.3.0 does not have")


def test_a_tensorrt_that_is_too_old_is_refused(copy_bundle, device, monkeypatch):
    fake_gpu.install(monkeypatch, device, fake_gpu.FakeTensorRT(device, "10.0.1"))
    build(copy_bundle("bundle")).refused(4, "got 10.0.1, expected at least 10.3")


def test_eight_bits_for_the_processor_are_refused_with_the_command(copy_bundle, tensorrt):
    build(copy_bundle("int8_bundle")).refused(2, "was calibrated for the processor", "--target trt")


@pytest.mark.parametrize("where", ["nowhere/mine.cache", "."])
def test_a_timing_cache_that_cannot_be_written_is_refused_before_the_build(copy_bundle, tensorrt, tmp_path, where):
    folder = copy_bundle("bundle")
    build(folder, "--timing-cache", tmp_path / where).refused(2, "expected a file in a folder that exists")
    assert tensorrt.builds == []
    assert plan_files(folder) == []


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


def test_what_the_parser_refuses_is_named_with_its_node(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
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
def test_a_failed_build_gives_tensorrts_reason(copy_bundle, tensorrt, reason, hint):
    folder = copy_bundle("bundle")
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


def test_a_timing_cache_of_another_gpu_is_refused(copy_bundle, tensorrt, tmp_path):
    (tmp_path / "other.cache").write_bytes(b"timings of NVIDIA Other, 10.16.1\n")
    build(copy_bundle("bundle"), "--timing-cache", tmp_path / "other.cache").refused(2, "of another GPU or TensorRT")


@pytest.fixture
def no_tensorrt(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("tensorrt") else real(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


def test_without_tensorrt_build_says_what_to_install(copy_bundle, no_tensorrt):
    build(copy_bundle("bundle")).refused(4, "TensorRT: it is not installed", "phreg-deploy[trt]")


def test_without_a_gpu_build_is_refused(copy_bundle, device, tensorrt):
    device.installed = 0
    build(copy_bundle("bundle")).refused(4, "no usable NVIDIA driver or GPU", "phreg-deploy doctor")


def test_build_is_refused_if_cuda_does_not_start(copy_bundle, tensorrt):
    tensorrt.starts = False
    build(copy_bundle("bundle")).refused(4, "cannot build here", "CUDA initialization failure")


def test_export_without_tensorrt_leaves_a_whole_bundle(student, no_tensorrt, traced_once, tmp_path):
    output = tmp_path / "out.bundle"
    done = invoke("export", student, "-o", output, "--format", "trt", "--precision", "fp16", "--json")
    done.refused(4, "The bundle is written and checked", "run there: phreg-deploy build out.bundle")
    assert done.document["bundle"] == str(output)
    Bundle.read(output).verify()
    with FeatureExtractor.load(output, "onnxruntime-cpu") as extractor:
        assert extractor(np.zeros((64, 64, 3), np.uint8)).features.shape == (1, 8, 8, 48)
    assert leftovers(tmp_path) == []
