"""Fake machines for `phreg-deploy doctor`: a driver in Python, and files below a folder."""

import struct

from phreg_deploy.doctor.gpu import TENSORRT_LIBRARIES, find_gpu_parts
from phreg_deploy.doctor.system import System

ABSENT = "ModuleNotFoundError: No module named '{}'"
ORT_CUDA = ["libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcuda.so.1", "libc.so.6"]
ORT_TENSORRT = ["libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10", "libcudart.so.13", "libcudnn.so.9"]


class FakeDriver:
    """The functions of libcuda.

    ``gpus``: (name, compute capability times ten, bytes). ``starts``: what ``cuInit`` returns. ``broken``: device ->
    its error.
    """

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


class FakeMachine:
    """A machine whose files are below ``root``.

    ``libraries``: those that the loader finds. ``packages``: installed distributions and their versions. ``modules``:
    what the import of a module prints. ``tried``: modules whose import was tried.
    """

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
    """Make the smallest ELF file that lists needed libraries: a header, a table of names and a dynamic section."""
    names, entries = b"\0", b""
    for name in needed:
        entries += struct.pack("<qQ", 1, len(names))
        names += name.encode() + b"\0"
    parts = [(0, 0, 0, 0), (3, 64, len(names), 0), (6, 64 + len(names), len(entries), 1)]
    sections = b"".join(struct.pack("<IIQQQQIIQQ", 0, k, 0, 0, at, size, link, 0, 1, 16) for k, at, size, link in parts)
    head = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", 64 + len(names) + len(entries))
    return head.ljust(58, b"\0") + struct.pack("<HHH", 64, 3, 0) + names + entries + sections


def add_tensorrt_wheel(machine, major, resources=("_sm90",)):
    resources = [f"libnvinfer_builder_resource{r}.so.{major}.4.0" for r in resources]
    for name in (*(f"{stem}.so.{major}" for stem in TENSORRT_LIBRARIES), *resources):
        machine.write(f"site/tensorrt_libs/{name}")


def add_onnxruntime_gpu(machine, libraries=()):
    machine.packages["onnxruntime-gpu"] = "1.31.1"
    for kind, needed in (("cuda", ORT_CUDA), ("tensorrt", ORT_TENSORRT)):
        machine.write(f"site/onnxruntime/capi/libonnxruntime_providers_{kind}.so", shared_object(needed))
    for name in libraries:
        machine.write(f"site/nvidia/cu13/lib/{name}")


def make_jetson(root, jetpack, l4t, tensorrt, **more):
    """Make a Jetson. ``jetpack``: the package's version; None if it is not installed, as in a container."""
    orin = FakeDriver(12060 if l4t.startswith("36") else 13020, (("Orin", 87, 32 << 30),))
    libraries = [f"{stem}.so.{tensorrt.split('.')[0]}" for stem in TENSORRT_LIBRARIES]
    found = FakeMachine(root, orin, libraries, modules={"tensorrt": tensorrt}, processor="aarch64", **more)
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
