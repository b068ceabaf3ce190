"""The project's CUDA source on the processor: a C++ compiler builds it behind ``kernel_shim.cpp``."""

import atexit
import ctypes
import enum
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from phreg_deploy.runtime.gpu_images.kernel import Pass

SHIM = Path(__file__).with_name("kernel_shim.cpp")
MARK = b"\x7fELF of the fake GPU "


@functools.lru_cache
def _folder():
    folder = Path(tempfile.mkdtemp(prefix="phreg-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.lru_cache
def compiled(source):
    """Compile CUDA source for the processor and load it; skip the test where there is no C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++ or clang++) to run the kernel with")
    stem = hashlib.sha256(source.encode()).hexdigest()[:16]
    file, library = _folder() / f"{stem}.cu", _folder() / f"{stem}.so"
    file.write_text(source)
    words = [compiler, "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f'-DSOURCE="{file}"']
    done = subprocess.run([*words, str(SHIM), "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))
    loaded.run_resample.argtypes = (ctypes.POINTER(Pass), *[ctypes.c_uint] * 4)
    loaded.resample_argument_size.restype = ctypes.c_ulong
    assert loaded.resample_argument_size() == ctypes.sizeof(Pass), "the two layouts differ"
    return loaded


def find(library, name):
    """The function that runs a kernel, or None."""
    return getattr(library, f"run_{name}", None)


def read_code(image):
    """The architecture and the source in the code that ``FakeNvrtc`` made."""
    assert image.startswith(MARK), "only code of the fake NVRTC runs on a fake GPU"
    architecture, _, source = image[len(MARK) :].partition(b"\n")
    return int(architecture), source.decode()


class Launch:
    """A queued launch of ``resample``; it runs only where everything that it reads and writes is allocated."""

    is_kernel = True

    def __init__(self, device, kernel, addresses, grid, block):
        self.device, self.kernel, self.grid, self.block = device, kernel, grid, block
        (address,) = (ctypes.c_void_p * 1).from_address(addresses)
        self.arguments = Pass.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(Pass)))

    def touches(self):
        """The (address, bytes) that the kernel may read or write, from its arguments."""
        p = self.arguments
        outputs = p.width if p.along_x else p.height
        # The first two rows of the table say which inputs are read.
        table = (ctypes.c_int32 * (2 * outputs)).from_address(p.table) if self._allocated(p.table, 8 * outputs) else ()
        spans = [(p.target, (p.rows - 1) * p.target_pitch + 3 * p.columns), (p.table, 8 * outputs)]
        if not table:
            return spans
        most, last = max(table[outputs:]), max(table[i] + table[outputs + i] for i in range(outputs))
        spans[1] = (p.table, 4 * outputs * (2 + most))
        columns, rows = (last, p.first + p.height) if p.along_x else (p.first + p.width, last)
        wide = columns * p.source_step if not p.chroma else columns
        if not p.chroma:
            wide = (columns - 1) * p.source_step + 3
        else:
            spans.append((p.chroma, (rows - 1) // 2 * p.chroma_pitch + (columns + 1) // 2 * 2))
        return [*spans, (p.source, (rows - 1) * p.source_pitch + wide)]

    def _allocated(self, pointer, size):
        return self.device.span(pointer or 0, size) is not None

    def __call__(self):
        if all(self._allocated(*span) for span in self.touches()):
            self.kernel(ctypes.byref(self.arguments), *self.grid, *self.block)
        else:
            self.device.crash("a kernel reached memory that is not allocated")


class nvrtcResult(enum.IntEnum):
    NVRTC_SUCCESS = 0
    NVRTC_ERROR_COMPILATION = 6


class FakeNvrtc:
    """``cuda.bindings.nvrtc``: the "machine code" is the source, which ``compiled`` builds for the processor.

    ``failing``: whether the source does not compile.
    """

    def __init__(self, device, failing=False):
        self._device, self._failing = device, failing

    def nvrtcVersion(self):
        return nvrtcResult.NVRTC_SUCCESS, 13, 0

    def nvrtcGetSupportedArchs(self):
        return nvrtcResult.NVRTC_SUCCESS, [75, 80, 86, 87, 89, 90, 100, 110, 120]

    def nvrtcCreateProgram(self, source, name, count, headers, names):
        self._device.calls.append(("nvrtcCreateProgram", (name,)))
        return nvrtcResult.NVRTC_SUCCESS, {"source": source}

    def nvrtcCompileProgram(self, program, count, options):
        (option,) = options
        program["architecture"] = int(option.rpartition(b"_")[2])
        return (nvrtcResult.NVRTC_ERROR_COMPILATION if self._failing else nvrtcResult.NVRTC_SUCCESS,)

    def nvrtcGetCUBINSize(self, program):
        return nvrtcResult.NVRTC_SUCCESS, len(self._code(program))

    def nvrtcGetCUBIN(self, program, data):
        return self._write(self._code(program), data)

    def nvrtcGetProgramLogSize(self, program):
        return nvrtcResult.NVRTC_SUCCESS, 8

    def nvrtcGetProgramLog(self, program, data):
        return self._write(b"an error", data)

    def nvrtcDestroyProgram(self, program):
        return (nvrtcResult.NVRTC_SUCCESS,)

    def _code(self, program):
        return MARK + str(program["architecture"]).encode() + b"\n" + program["source"]

    def _write(self, code, data):
        # As cuda-python does, into the bytes themselves.
        ctypes.memmove(data, code, len(code))
        return (nvrtcResult.NVRTC_SUCCESS,)
