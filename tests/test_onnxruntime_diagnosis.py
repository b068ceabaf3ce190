"""`phreg-deploy doctor` on ONNX Runtime's GPU providers: the libraries that they need, and which are missing."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

from phreg_deploy.runtime.gpu.libraries import needed_libraries
from tests.fake_machines import ORT_CUDA, FakeDriver, FakeMachine, add_onnxruntime_gpu, shared_object


def test_onnxruntime_names_the_libraries_that_it_lacks(tmp_path):
    machine = FakeMachine(tmp_path, FakeDriver())
    add_onnxruntime_gpu(machine, ORT_CUDA)
    found = machine.findings()
    assert "lacks libcudnn.so.9" in found["onnxruntime on CUDA"].state, "opened late, so in no header"
    assert found["onnxruntime on CUDA"].mend == 'pip install "onnxruntime-gpu[cuda,cudnn]"'
    assert found["onnxruntime on TensorRT"].state.endswith(
        "lacks libnvinfer.so.10, libnvonnxparser.so.10, libcudnn.so.9, libnvinfer_plugin.so.10"
    )
    machine.write("site/nvidia/cudnn/lib/libcudnn.so.9")
    found = machine.findings()
    assert found["onnxruntime on CUDA"].usable
    assert found["onnxruntime on TensorRT"].mend == 'pip install "tensorrt>=10.3,<11"'
    machine.packages["tensorrt"] = "11.4.0"
    assert "environment of its own" in machine.findings()["onnxruntime on TensorRT"].mend
    machine.libraries |= dict.fromkeys(["libnvinfer.so.10", "libnvonnxparser.so.10", "libnvinfer_plugin.so.10"], 1)
    assert machine.findings()["onnxruntime on TensorRT"].usable, "the loader finds what no wheel brings"


def test_onnxruntime_of_another_build_or_cuda_is_explained(tmp_path):
    machine = FakeMachine(tmp_path, FakeDriver(12080), packages={"onnxruntime": "1.31.1"})
    found = machine.findings()["onnxruntime on CUDA"]
    assert found.mend == 'pip uninstall onnxruntime, then pip install "phreg-deploy[gpu]"'
    add_onnxruntime_gpu(machine, [*ORT_CUDA, "libcudnn.so.9"])
    found = machine.findings()["onnxruntime on CUDA"]
    assert "built for CUDA 13, and the driver is of CUDA 12" in found.state
    assert not found.usable
    (machine.site / "onnxruntime/capi/libonnxruntime_providers_cuda.so").unlink()
    assert "built without this provider" in machine.findings()["onnxruntime on CUDA"].state
    machine.write("site/onnxruntime/capi/libonnxruntime_providers_cuda.so", b"\x7fELF\x02\x01" + bytes(20))
    found = machine.findings()["onnxruntime on CUDA"]
    assert (found.usable, found.mend) == (False, 'pip install --force-reinstall "phreg-deploy[gpu]"')
    assert "cannot be asked: error" in found.state


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_needed_libraries_are_read_from_elf_files(tmp_path):
    numpy = Path(import_module("numpy").__file__).parent
    real = next(p for p in sorted((numpy / "_core").glob("_multiarray_umath*.so")))
    assert any(name.startswith("libc.so") for name in needed_libraries(real))
    (tmp_path / "fake.so").write_bytes(shared_object(["liba.so.1", "libb.so"]))
    assert needed_libraries(tmp_path / "fake.so") == ["liba.so.1", "libb.so"]
    (tmp_path / "text.so").write_text("GROUP ( libc.so.6 )")
    with pytest.raises(ValueError, match="no 64-bit"):
        needed_libraries(tmp_path / "text.so")
