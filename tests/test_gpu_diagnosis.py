"""`phreg-deploy doctor` on fake machines with and without a GPU, and on this one."""

import ctypes

import pytest

from phreg_deploy.doctor.gpu import NEEDLESS, PARTS, find_gpu_parts
from phreg_deploy.doctor.system import System, attempt
from phreg_deploy.spec import Stored
from tests.fake_machines import (
    ABSENT,
    ORT_CUDA,
    FakeDriver,
    FakeMachine,
    add_onnxruntime_gpu,
    add_tensorrt_wheel,
)

NONE = "no libnvinfer_builder_resource"


def test_without_a_gpu_nothing_is_imported_or_proposed(tmp_path):
    machine = FakeMachine(tmp_path, packages={"cuda-bindings": "13.5.0", "onnxruntime": "1.31.1"})
    found = machine.findings()
    assert list(found) == ["NVIDIA driver", *PARTS]
    assert found.pop("NVIDIA driver").mend == "none needed for the CPU; else install the NVIDIA driver"
    for finding in found.values():
        assert (finding.state, finding.usable, finding.mend) == (NEEDLESS, False, None)
    assert machine.tried == [], "no GPU package is imported without a GPU"


def test_a_complete_workstation_needs_nothing(tmp_path):
    machine = FakeMachine(
        tmp_path,
        FakeDriver(13020, (("NVIDIA H100", 90, 80 << 30), ("NVIDIA RTX A2000", 86, 12 << 30))),
        ["libnvidia-ml.so.1"],
        {"cuda-bindings": "13.2.0", "nvidia-ml-py": "13.580"},
        {"tensorrt": "11.4.0.106", "cuda.bindings.runtime": "ok", "cuda.bindings.nvrtc": "13.0"},
    )
    add_tensorrt_wheel(machine, 11, ("_sm80", "_sm90"))
    add_onnxruntime_gpu(machine, [*ORT_CUDA, "libcudnn.so.9"])
    found = machine.findings()
    assert found["NVIDIA driver"].state == (
        "CUDA 13.2, 2 GPUs: NVIDIA H100, SM 9.0, 80.0 GiB; NVIDIA RTX A2000, SM 8.6, 12.0 GiB"
    )
    for part in ("NVIDIA driver", "cuda-python", "NVRTC", "TensorRT", "onnxruntime on CUDA", "nvidia-ml-py"):
        assert (found[part].usable, found[part].mend) == (True, None), found[part]
    assert "JetPack" not in found
    assert "waits" not in str(found)


@pytest.mark.parametrize(
    ("driver", "bindings", "said", "mend"),
    [
        (12080, "13.5.0", "ok", 'pip install "cuda-python<13"'),
        (12080, "12.9.1", "ok", None),
        (13000, "13.5.0", "ok", None),
        (13000, "12.9.1", "ok", None),
        (13000, "14.0.0", "ok", 'pip install "cuda-python<14"'),
        (13000, None, "ok", 'pip install "phreg-deploy[cuda]"'),
        (12080, None, "ok", 'pip install "phreg-deploy[cuda]" "cuda-python<13"'),
        (12080, "12.2.0", ABSENT.format("cuda.bindings"), 'pip install --force-reinstall "cuda-python<13"'),
    ],
)
def test_cuda_python_must_match_the_driver(tmp_path, driver, bindings, said, mend):
    packages = {"cuda-bindings": bindings} if bindings else {}
    machine = FakeMachine(tmp_path, FakeDriver(driver), packages=packages, modules={"cuda.bindings.runtime": said})
    found = machine.findings()["cuda-python"]
    assert (found.usable, found.mend) == (mend is None, mend), found


@pytest.mark.parametrize(
    ("driver", "said", "usable"),
    [(12080, "13.0", False), (12080, "12.9", True), (13000, "12.9", True), (13000, ABSENT.format("cuda"), False)],
)
def test_nvrtc_must_match_the_driver(tmp_path, driver, said, usable):
    machine = FakeMachine(tmp_path, FakeDriver(driver), modules={"cuda.bindings.nvrtc": said})
    found = machine.findings()["NVRTC"]
    mend = f'pip install "cuda-toolkit[nvrtc]<{driver // 1000 + 1}"'
    assert (found.usable, found.mend) == (usable, None if usable else mend), found


@pytest.mark.parametrize(("wheel", "driver", "usable"), [(13, 12080, False), (12, 12080, True), (12, 13020, True)])
def test_tensorrt_must_match_the_driver(tmp_path, wheel, driver, usable):
    packages = {f"tensorrt-cu{wheel}-bindings": "11.4.0.106"}
    machine = FakeMachine(tmp_path, FakeDriver(driver), packages=packages, modules={"tensorrt": "11.4.0.106"})
    add_tensorrt_wheel(machine, 11)
    found = machine.findings()["TensorRT"]
    assert found.usable == usable, found
    if not usable:
        assert found.state == "11.4.0.106 is built for CUDA 13, and the driver is of CUDA 12"
        assert found.mend.endswith('tensorrt-cu13-libs; pip install "tensorrt-cu12>=10.3"')


def test_tensorrt_that_lacks_libraries_is_not_usable(tmp_path):
    machine = FakeMachine(tmp_path, FakeDriver(), modules={"tensorrt": "11.4.0"})
    found = machine.findings()["TensorRT"]
    assert found.state == "11.4.0, without libnvinfer.so.11, libnvinfer_plugin.so.11, libnvonnxparser.so.11"
    assert (found.usable, found.mend) == (False, 'pip install "phreg-deploy[trt]"')
    add_tensorrt_wheel(machine, 10)
    assert not machine.findings()["TensorRT"].usable, "libraries of another version do not count"
    machine.modules["tensorrt"] = "ImportError: libnvonnxparser.so.11: cannot open shared object file"
    found = machine.findings()["TensorRT"]
    assert "libnvonnxparser.so.11" in found.state
    assert "--force-reinstall" in found.mend
    machine.modules["tensorrt"] = "8.6.1"
    assert "expected at least 10.3" in machine.findings()["TensorRT"].state


@pytest.mark.parametrize(
    ("architecture", "resources", "why"),
    [
        (90, ("",), None),
        (90, ("_sm80", "_sm90"), None),
        (87, ("_sm86",), None),
        (86, ("_sm89",), f"{NONE} for SM 8.6"),
        (90, ("_sm80",), f"{NONE} for SM 9.0"),
        (90, ("_sm80", "_ptx"), None),
        (90, (), f"{NONE} in"),
    ],
)
def test_tensorrt_without_resources_for_the_gpu_only_runs_engines(tmp_path, architecture, resources, why):
    machine = FakeMachine(tmp_path, FakeDriver(gpus=(("GPU", architecture, 1 << 30),)), modules={"tensorrt": "11.4.0"})
    add_tensorrt_wheel(machine, 11, resources)
    found = machine.findings()["TensorRT"]
    assert found.usable, "a machine without builder resources still runs engines"
    assert (found.mend is None) == (why is None)
    assert found.state.startswith(f"11.4.0: runs engines, builds none: {why}" if why else "11.4.0")
    assert ("builds" in found.state) == (why is not None)


def test_lean_tensorrt_only_runs_engines(tmp_path):
    found = FakeMachine(tmp_path, FakeDriver(), modules={"tensorrt_lean": "11.4.0"}).findings()["TensorRT"]
    assert found.usable
    assert "lean 11.4.0: runs engines built with compatibility version, builds none" in found.state


@pytest.mark.parametrize(
    ("code", "words"),
    [(100, "--gpus all"), (34, "stubs"), (803, "reboot"), (802, "fabricmanager"), (9999, "nvidia-smi")],
)
def test_a_driver_that_does_not_start_is_explained(tmp_path, code, words):
    machine = FakeMachine(tmp_path, FakeDriver(12080, starts=code), ["libnvinfer.so.10"], {"cuda-bindings": "12.9"})
    machine.modules = {"cuda.bindings.runtime": "ok", "tensorrt_lean": "10.16.1"}
    found = machine.findings()
    assert f"CUDA 12.8, but cuInit fails with error {code}" in found["NVIDIA driver"].state
    assert words in found["NVIDIA driver"].mend
    for part in ("cuda-python", "TensorRT"):
        assert not found[part].usable, "TensorRT can be imported without a driver that works"
        assert found[part].state.endswith("waits for a GPU")


def test_a_driver_without_gpus_and_a_gpu_that_fails_are_reported(tmp_path):
    found = FakeMachine(tmp_path, FakeDriver(gpus=())).findings()["NVIDIA driver"]
    assert (found.state, found.usable) == ("CUDA 13.0, 0 GPUs", False)
    assert "nvidia-smi" in found.mend
    two = (("A", 80, 1 << 30), ("B", 80, 2 << 30))
    found = FakeMachine(tmp_path, FakeDriver(gpus=two, broken={0: 101})).findings()["NVIDIA driver"]
    assert found.state == "CUDA 13.0, 2 GPUs: GPU 0 cannot be asked (error 101); B, SM 8.0, 2.0 GiB"
    assert found.usable


def test_an_error_in_any_probe_is_a_finding(tmp_path):
    machine = FakeMachine(tmp_path, object())
    machine.packages = {"cuda-bindings": "broken", "nvidia-ml-py": "13.0"}
    machine.modules = {"tensorrt": "no version"}
    found = machine.findings()
    assert "cannot be asked: AttributeError" in found["NVIDIA driver"].state
    assert "cannot be asked: ValueError" in found["cuda-python"].state
    assert found["cuda-python"].mend == 'pip install --force-reinstall "phreg-deploy[cuda]"'
    assert "libnvidia-ml.so.1 is not found" in found["nvidia-ml-py"].state
    for finding in found.values():
        assert not finding.usable
        assert isinstance(finding, Stored)

    def raising(*_):
        raise RuntimeError("anything")

    around = System(tmp_path, raising, raising, raising, (tmp_path,))
    assert [f.usable for f in find_gpu_parts(around)] == [False] * (1 + len(PARTS))


def test_an_import_that_crashes_its_process_is_reported():
    assert attempt("print('first'); print('last')") == (True, "last")
    assert attempt("import os; os.abort()") == (False, "exit code -6")
    worked, said = attempt("import no_such_module")
    assert not worked
    assert said == ABSENT.format("no_such_module")
    assert "timed out" in attempt("import time; time.sleep(20)", 1)[1]


def test_this_machine_gives_every_finding():
    found = {f.part: f for f in find_gpu_parts()}
    assert set(found) - {"JetPack"} == {"NVIDIA driver", *PARTS}
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert not any(f.usable for f in found.values() if f.part != "JetPack")
        assert [f.state for f in found.values()].count(NEEDLESS) in (0, len(PARTS))
    else:
        assert "not found" not in found["NVIDIA driver"].state
    for finding in found.values():
        assert "cannot be asked" not in finding.state, finding
