"""What doctor says of GPUs, on machines that are made here of files and a driver in Python, and on the real one."""

import ctypes
import struct
import sys
from importlib import import_module
from pathlib import Path

import pytest

from phreg_deploy.doctor.gpu import NEEDLESS, PARTS, TENSORRT_LIBRARIES, find_gpu_parts
from phreg_deploy.doctor.system import Jetson, System, attempt, read_jetson
from phreg_deploy.runtime.gpu.libraries import needed_libraries
from phreg_deploy.spec import Stored

NONE = "no libnvinfer_builder_resource"
ABSENT = "ModuleNotFoundError: No module named '{}'"
ORT_CUDA = ["libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcuda.so.1", "libc.so.6"]
ORT_TENSORRT = ["libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10", "libcudart.so.13", "libcudnn.so.9"]


class FakeDriver:
    """libcuda as ctypes sees it. ``gpus``: (name, compute capability times ten, bytes); ``broken``: device -> error."""

    def __init__(self, cuda=13000, gpus=(("NVIDIA H100", 90, 80 << 30),), starts=0, broken=()):
        broken = dict(broken)

        def answer(number, value, code=0):
            getattr(number, "_obj", number).value = value
            return code

        self.cuDriverGetVersion = lambda number: answer(number, cuda)
        self.cuInit = lambda flags: starts
        self.cuDeviceGetCount = lambda count: answer(count, len(gpus))
        self.cuDeviceGet = lambda device, index: answer(device, index, broken.get(index, 0))
        self.cuDeviceGetName = lambda name, size, device: answer(name, gpus[device.value][0].encode()[: size - 1])
        self.cuDeviceGetAttribute = lambda number, kind, device: answer(
            number, {75: gpus[device.value][1] // 10, 76: gpus[device.value][1] % 10}[kind]
        )
        self.cuDeviceTotalMem_v2 = lambda memory, device: answer(memory, gpus[device.value][2])


class Computer:
    """A machine of fakes below ``root``: what is installed, what the loader finds, what an import says."""

    def __init__(self, root, driver=None, libraries=(), packages=(), modules=(), processor="x86_64"):
        self.root, self.site, self.processor = root, root / "site", processor
        self.libraries = dict.fromkeys(libraries, object()) | ({"libcuda.so.1": driver} if driver else {})
        self.packages, self.modules, self.tried = dict(packages), dict(modules), []

    def write(self, path, content=""):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    def library(self, name):
        if name not in self.libraries:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return self.libraries[name]

    def attempt(self, code):
        module = code.split("import ")[1].split(";")[0]
        self.tried.append(module)
        said = self.modules.get(module, ABSENT.format(module))
        return "Error" not in said, said

    def findings(self):
        around = System(
            self.root, self.library, self.packages.get, self.attempt, (self.site,), path="", processor=self.processor
        )
        return {f.part: f for f in find_gpu_parts(around)}


def shared_object(needed):
    """The least file that says which libraries it needs: a header, a table of names and a dynamic section."""
    names, entries = b"\0", b""
    for name in needed:
        entries += struct.pack("<qQ", 1, len(names))
        names += name.encode() + b"\0"
    parts = [(0, 0, 0, 0), (3, 64, len(names), 0), (6, 64 + len(names), len(entries), 1)]
    sections = b"".join(struct.pack("<IIQQQQIIQQ", 0, k, 0, 0, at, size, link, 0, 1, 16) for k, at, size, link in parts)
    head = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", 64 + len(names) + len(entries))
    return head.ljust(58, b"\0") + struct.pack("<HHH", 64, 3, 0) + names + entries + sections


def tensorrt_wheel(computer, major, resources=("_sm90",)):
    resources = [f"libnvinfer_builder_resource{r}.so.{major}.4.0" for r in resources]
    for name in (*(f"{stem}.so.{major}" for stem in TENSORRT_LIBRARIES), *resources):
        computer.write(f"site/tensorrt_libs/{name}")


def onnxruntime_gpu(computer, libraries=()):
    computer.packages["onnxruntime-gpu"] = "1.31.1"
    for kind, needed in (("cuda", ORT_CUDA), ("tensorrt", ORT_TENSORRT)):
        computer.write(f"site/onnxruntime/capi/libonnxruntime_providers_{kind}.so", shared_object(needed))
    for name in libraries:
        computer.write(f"site/nvidia/cu13/lib/{name}")


def jetson(root, jetpack, l4t, tensorrt, **more):
    """``jetpack``: the package's version, None where it is not installed (in a container)."""
    orin = FakeDriver(12060 if l4t.startswith("36") else 13020, (("Orin", 87, 32 << 30),))
    libraries = [f"{stem}.so.{tensorrt.split('.')[0]}" for stem in TENSORRT_LIBRARIES]
    found = Computer(root, orin, libraries, modules={"tensorrt": tensorrt}, processor="aarch64", **more)
    number, revision = l4t.split(".", 1)
    found.write("etc/nv_tegra_release", f"# R{number} (release), REVISION: {revision}, GCID: 1, BOARD: generic\n")
    found.write("proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    package = f"Package: nvidia-jetpack\nStatus: install ok installed\nVersion: {jetpack}\n\n" if jetpack else ""
    old = "Package: nvidia-jetpack-runtime\nStatus: install ok installed\nVersion: 1.0\n\n"
    found.write("var/lib/dpkg/status", f"{old}{package}Package: other\nStatus: install ok installed\nVersion: 9\n")
    for name in libraries:
        found.write(f"usr/lib/aarch64-linux-gnu/{name}")
    found.write(f"usr/lib/aarch64-linux-gnu/libnvinfer_builder_resource.so.{tensorrt}")
    return found


def test_no_gpu_at_all_is_short(tmp_path):
    computer = Computer(tmp_path, packages={"cuda-bindings": "13.5.0", "onnxruntime": "1.31.1"})
    found = computer.findings()
    assert list(found) == ["NVIDIA driver", *PARTS]
    assert found.pop("NVIDIA driver").mend == "none needed for the CPU; else install the NVIDIA driver"
    for finding in found.values():
        assert (finding.state, finding.usable, finding.mend) == (NEEDLESS, False, None)
    assert computer.tried == [], "nothing is imported for a GPU that is not there"


def test_a_workstation_in_order(tmp_path):
    computer = Computer(
        tmp_path,
        FakeDriver(13020, (("NVIDIA H100", 90, 80 << 30), ("NVIDIA RTX A2000", 86, 12 << 30))),
        ["libnvidia-ml.so.1"],
        {"cuda-bindings": "13.2.0", "nvidia-ml-py": "13.580"},
        {"tensorrt": "11.4.0.106", "cuda.bindings.runtime": "ok"},
    )
    tensorrt_wheel(computer, 11, ("_sm80", "_sm90"))
    onnxruntime_gpu(computer, [*ORT_CUDA, "libcudnn.so.9"])
    found = computer.findings()
    assert found["NVIDIA driver"].state == (
        "CUDA 13.2, 2 GPUs: NVIDIA H100, SM 9.0, 80.0 GiB; NVIDIA RTX A2000, SM 8.6, 12.0 GiB"
    )
    for part in ("NVIDIA driver", "cuda-python", "TensorRT", "onnxruntime on CUDA", "nvidia-ml-py"):
        assert (found[part].usable, found[part].mend) == (True, None), found[part]
    assert "JetPack" not in found
    assert "waits" not in str(found)


def test_jetpack_6_2(tmp_path):
    found = jetson(tmp_path, "6.2+b77", "36.4.3", "10.3.0").findings()
    assert found["NVIDIA driver"].state == "CUDA 12.6, 1 GPU: Orin, SM 8.7, 32.0 GiB"
    assert found["JetPack"].state == "JetPack 6.2, L4T 36.4.3, NVIDIA Jetson AGX Orin Developer Kit"
    assert (found["TensorRT"].state, found["TensorRT"].usable, found["TensorRT"].mend) == ("10.3.0", True, None)
    assert found["cuda-python"].mend == 'pip install "phreg-deploy[cuda]" "cuda-python<13"'
    assert "use TensorRT" in found["onnxruntime on CUDA"].state
    assert found["onnxruntime on CUDA"].mend is None, "no wheel for aarch64 is proposed where there is none"


def test_jetpack_7_2_with_tensorrt_11_4_0_is_refused(tmp_path):
    found = jetson(tmp_path, "7.2+b60", "39.2.0", "11.4.0.106").findings()["TensorRT"]
    assert not found.usable
    assert "11.4.1 is the first" in found.state
    assert found.mend.startswith("pip uninstall tensorrt; sudo apt install nvidia-jetpack")
    assert "--system-site-packages" in found.mend
    assert jetson(tmp_path, "7.2+b60", "39.2.0", "10.16.2").findings()["TensorRT"].usable


@pytest.mark.parametrize(
    ("jetpack", "tensorrt", "why"),
    [
        ((6, 2), (10, 3, 0), None),
        ((6, 2), (11, 4, 1), "JetPack 6.x stays"),
        ((6,), (11, 0, 0), "JetPack 6.x stays"),
        ((7, 2), (10, 16, 2), None),
        ((7, 2, 2), (11, 4, 0, 106), "do not support Jetson"),
        ((7, 2, 1), (11, 4, 1), "needs JetPack 7.2.2"),
        ((7,), (11, 4, 1), "needs JetPack 7.2.2"),
        ((7, 2, 2), (11, 4, 1, 5), None),
        ((8, 0), (12, 0), None),
        ((), (11, 3), "do not support"),
        ((), (11, 4, 1), None),
    ],
)
def test_the_rule_of_jetpack(jetpack, tensorrt, why):
    said = Jetson("Orin", "", jetpack).refusal(tensorrt)
    assert said is None if why is None else why in said


@pytest.mark.parametrize(
    ("l4t", "jetpack"), [("36.4.3", (6,)), ("38.4", (7,)), ("39.2.0", (7, 2, 0)), ("39.2.1", (7, 2, 1)), ("41.0", ())]
)
def test_jetpack_in_a_container_is_told_by_l4t(tmp_path, l4t, jetpack):
    jetson(tmp_path, None, l4t, "10.3.0")
    assert read_jetson(tmp_path).jetpack == jetpack


def test_a_container_on_a_jetson_without_the_gpu(tmp_path):
    computer = Computer(tmp_path, processor="aarch64")
    computer.write("proc/device-tree/compatible", "nvidia,p3737-0000\0nvidia,tegra234\0")
    found = computer.findings()
    assert "--runtime nvidia" in found["NVIDIA driver"].mend
    assert found["JetPack"].state == "JetPack of unknown version"
    assert "sudo apt install nvidia-jetpack" in found["TensorRT"].mend
    computer.write("var/lib/dpkg/status", "Package: nvidia-jetpack\nStatus: deinstall ok config-files\nVersion: 6.2\n")
    assert read_jetson(tmp_path).jetpack == (), "what was removed does not count"


def test_a_venv_that_does_not_see_jetpacks_tensorrt(tmp_path):
    computer = jetson(tmp_path, "6.2+b77", "36.4.3", "10.3.0")
    computer.modules.clear()
    computer.write("usr/lib/python3.10/dist-packages/tensorrt/__init__.py")
    found = computer.findings()["TensorRT"]
    assert "python3.10/dist-packages, which this environment does not see" in found.state
    assert "--system-site-packages" in found.mend
    assert "apt" not in found.mend


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
def test_cuda_python_against_the_driver(tmp_path, driver, bindings, said, mend):
    packages = {"cuda-bindings": bindings} if bindings else {}
    computer = Computer(tmp_path, FakeDriver(driver), packages=packages, modules={"cuda.bindings.runtime": said})
    found = computer.findings()["cuda-python"]
    assert (found.usable, found.mend) == (mend is None, mend), found


def test_onnxruntime_without_cudnn(tmp_path):
    computer = Computer(tmp_path, FakeDriver())
    onnxruntime_gpu(computer, ORT_CUDA)
    found = computer.findings()
    assert "lacks libcudnn.so.9" in found["onnxruntime on CUDA"].state, "opened late, so in no header"
    assert found["onnxruntime on CUDA"].mend == 'pip install "onnxruntime-gpu[cuda,cudnn]"'
    assert found["onnxruntime on TensorRT"].state.endswith(
        "lacks libnvinfer.so.10, libnvonnxparser.so.10, libcudnn.so.9, libnvinfer_plugin.so.10"
    )
    computer.write("site/nvidia/cudnn/lib/libcudnn.so.9")
    found = computer.findings()
    assert found["onnxruntime on CUDA"].usable
    assert found["onnxruntime on TensorRT"].mend == 'pip install "tensorrt>=10.3,<11"'
    computer.packages["tensorrt"] = "11.4.0"
    assert "environment of its own" in computer.findings()["onnxruntime on TensorRT"].mend
    computer.libraries |= dict.fromkeys(["libnvinfer.so.10", "libnvonnxparser.so.10", "libnvinfer_plugin.so.10"], 1)
    assert computer.findings()["onnxruntime on TensorRT"].usable, "the loader finds what no wheel brings"


def test_other_states_of_onnxruntime(tmp_path):
    computer = Computer(tmp_path, FakeDriver(12080), packages={"onnxruntime": "1.31.1"})
    found = computer.findings()["onnxruntime on CUDA"]
    assert found.mend == 'pip uninstall onnxruntime, then pip install "phreg-deploy[gpu]"'
    onnxruntime_gpu(computer, [*ORT_CUDA, "libcudnn.so.9"])
    found = computer.findings()["onnxruntime on CUDA"]
    assert "built for CUDA 13, and the driver is of CUDA 12" in found.state
    assert not found.usable
    (computer.site / "onnxruntime/capi/libonnxruntime_providers_cuda.so").unlink()
    assert "built without this provider" in computer.findings()["onnxruntime on CUDA"].state
    computer.write("site/onnxruntime/capi/libonnxruntime_providers_cuda.so", b"\x7fELF\x02\x01" + bytes(20))
    found = computer.findings()["onnxruntime on CUDA"]
    assert (found.usable, found.mend) == (False, 'pip install --force-reinstall "phreg-deploy[gpu]"')
    assert "cannot be asked: error" in found.state


def test_tensorrt_that_imports_but_lacks_libraries(tmp_path):
    computer = Computer(tmp_path, FakeDriver(), modules={"tensorrt": "11.4.0"})
    found = computer.findings()["TensorRT"]
    assert found.state == "11.4.0, without libnvinfer.so.11, libnvinfer_plugin.so.11, libnvonnxparser.so.11"
    assert (found.usable, found.mend) == (False, 'pip install "phreg-deploy[trt]"')
    tensorrt_wheel(computer, 10)
    assert not computer.findings()["TensorRT"].usable, "another version's libraries are of no use"
    computer.modules["tensorrt"] = "ImportError: libnvonnxparser.so.11: cannot open shared object file"
    found = computer.findings()["TensorRT"]
    assert "libnvonnxparser.so.11" in found.state
    assert "--force-reinstall" in found.mend
    computer.modules["tensorrt"] = "8.6.1"
    assert "expected at least 10.3" in computer.findings()["TensorRT"].state


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
def test_the_builders_resources(tmp_path, architecture, resources, why):
    computer = Computer(tmp_path, FakeDriver(gpus=(("GPU", architecture, 1 << 30),)), modules={"tensorrt": "11.4.0"})
    tensorrt_wheel(computer, 11, resources)
    found = computer.findings()["TensorRT"]
    assert found.usable, "a robot runs engines without what builds them"
    assert (found.mend is None) == (why is None)
    assert found.state.startswith(f"11.4.0: runs engines, builds none: {why}" if why else "11.4.0")
    assert ("builds" in found.state) == (why is not None)


def test_lean_tensorrt(tmp_path):
    found = Computer(tmp_path, FakeDriver(), modules={"tensorrt_lean": "11.4.0"}).findings()["TensorRT"]
    assert found.usable
    assert "lean 11.4.0: runs engines built with compatibility version, builds none" in found.state


@pytest.mark.parametrize(
    ("code", "words"),
    [(100, "--gpus all"), (34, "stubs"), (803, "reboot"), (802, "fabricmanager"), (9999, "nvidia-smi")],
)
def test_a_driver_that_does_not_start(tmp_path, code, words):
    computer = Computer(tmp_path, FakeDriver(12080, starts=code), ["libnvinfer.so.10"], {"cuda-bindings": "12.9"})
    computer.modules = {"cuda.bindings.runtime": "ok", "tensorrt_lean": "10.16.1"}
    found = computer.findings()
    assert f"CUDA 12.8, but cuInit fails with error {code}" in found["NVIDIA driver"].state
    assert words in found["NVIDIA driver"].mend
    for part in ("cuda-python", "TensorRT"):
        assert not found[part].usable, "an object that is made is no proof that it works"
        assert found[part].state.endswith("waits for a GPU")


def test_a_driver_without_gpus_or_with_a_lost_one(tmp_path):
    found = Computer(tmp_path, FakeDriver(gpus=())).findings()["NVIDIA driver"]
    assert (found.state, found.usable) == ("CUDA 13.0, 0 GPUs", False)
    assert "nvidia-smi" in found.mend
    two = (("A", 80, 1 << 30), ("B", 80, 2 << 30))
    found = Computer(tmp_path, FakeDriver(gpus=two, broken={0: 101})).findings()["NVIDIA driver"]
    assert found.state == "CUDA 13.0, 2 GPUs: GPU 0 cannot be asked (error 101); B, SM 8.0, 2.0 GiB"
    assert found.usable


def test_nothing_raises(tmp_path):
    computer = Computer(tmp_path, object())
    computer.packages = {"cuda-bindings": "broken", "nvidia-ml-py": "13.0"}
    computer.modules = {"tensorrt": "no version"}
    found = computer.findings()
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
    assert [f.usable for f in find_gpu_parts(around)] == [False] * 6


def test_an_import_that_crashes_its_process_is_told():
    assert attempt("print('first'); print('last')") == (True, "last")
    assert attempt("import os; os.abort()") == (False, "exit code -6")
    worked, said = attempt("import no_such_module")
    assert not worked
    assert said == ABSENT.format("no_such_module")
    assert "timed out" in attempt("import time; time.sleep(20)", 1)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_needed_libraries_of_real_files(tmp_path):
    numpy = Path(import_module("numpy").__file__).parent
    real = next(p for p in sorted((numpy / "_core").glob("_multiarray_umath*.so")))
    assert any(name.startswith("libc.so") for name in needed_libraries(real))
    (tmp_path / "fake.so").write_bytes(shared_object(["liba.so.1", "libb.so"]))
    assert needed_libraries(tmp_path / "fake.so") == ["liba.so.1", "libb.so"]
    (tmp_path / "text.so").write_text("GROUP ( libc.so.6 )")
    with pytest.raises(ValueError, match="no 64-bit"):
        needed_libraries(tmp_path / "text.so")


def test_the_real_machine():
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
