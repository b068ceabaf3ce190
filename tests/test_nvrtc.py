"""NVIDIA's own compiler takes the kernel for every GPU that it knows; it needs no GPU."""

import pytest

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.gpu_images import nvrtc
from phreg_deploy.runtime.gpu_images.kernel import SOURCE


@pytest.fixture(scope="module")
def known():
    """The architectures that the installed NVRTC compiles for."""
    module = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        return [int(a) for a in module.nvrtcGetSupportedArchs()[1]]
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")


@pytest.mark.parametrize("architecture", [72, 75, 80, 86, 87, 89, 90, 100, 110, 120])
def test_the_kernel_compiles_to_machine_code(known, architecture):
    if architecture < min(known):
        with pytest.raises(BackendMissing, match=f"from {min(known) / 10} on; got {architecture / 10}"):
            nvrtc.compile_source(SOURCE.read_text(), "resample", architecture)
        return
    if architecture not in known:
        pytest.skip(f"this NVRTC does not know {architecture}")
    code = nvrtc.compile_source(SOURCE.read_text(), "resample", architecture)
    assert code.startswith(b"\x7fELF")
    assert b".text.resample" in code


def test_a_newer_gpu_gets_portable_code(known):
    code = nvrtc.compile_source(SOURCE.read_text(), "resample", 999)
    assert f".target sm_{max(known)}".encode() in code
    assert code.endswith(b"\0"), "cuModuleLoadData reads PTX to its end"


def test_an_error_quotes_the_compiler(known):
    with pytest.raises(PhregError, match=r"cannot compile resample.cu for --gpu-architecture=.*error"):
        nvrtc.compile_source("broken(", "resample", max(known))


def test_a_missing_library_is_named(monkeypatch):
    class Nothing:
        def nvrtcGetSupportedArchs(self):
            raise RuntimeError("Failure finding libnvrtc.so")

    monkeypatch.setattr(nvrtc, "_load", Nothing)
    with pytest.raises(BackendMissing, match=r"Failure finding libnvrtc.so.*phreg-deploy\[gpu-images\]"):
        nvrtc.compile_source("", "resample", 87)
