"""Run NVIDIA's own bindings, parser and builder on a machine without a GPU, and read the kernels from a plan's text.

A shim (``shim.c``) makes the bindings of any version importable. With TensorRT for RTX behind it, they parse and build.
A process can load one version only, so each runs in a subprocess. ``nvidia_wheels.py`` fetches the files.
"""

import atexit
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli_helpers import ROOT
from tests.nvidia_wheels import VERSIONS, default_folder

# TensorRT for RTX 1.7 has the interface of this version.
NEWEST = VERSIONS[-1]
SONAMES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser", "libnvinfer_lean")
FETCH = "fetch it with `python -m tests.nvidia_wheels`"

BOOT = """
import ctypes, json, os, sys
_major, _shims, _bindings, *_libraries = sys.argv[1:6]
os.environ["SHIM_INFER"], os.environ["SHIM_PARSER"] = _libraries
for _name in %r:
    ctypes.CDLL(f"{_shims}/{_name}.so.{_major}", ctypes.RTLD_GLOBAL)
sys.path.insert(0, _bindings)
import importlib
_package = "tensorrt_bindings" if os.path.isdir(f"{_bindings}/tensorrt_bindings") else "tensorrt_lean_bindings"
sys.modules["tensorrt"] = importlib.import_module(_package)
sys.path.remove(_bindings)
given = json.load(sys.stdin)
""" % (SONAMES,)  # noqa: UP031


def bindings(version: str) -> Path:
    """Return the folder of one version of the bindings, or of the "lean" runtime's; skip if it was not fetched."""
    folder = default_folder() / version
    if not any((folder / package).is_dir() for package in ("tensorrt_bindings", "tensorrt_lean_bindings")):
        pytest.skip(f"no TensorRT {version} bindings in {folder.parent}: {FETCH}")
    return folder


def rtx_libraries() -> list[str]:
    """Return the builder and the parser of TensorRT for RTX; skip if they were not fetched."""
    folder = default_folder() / "rtx"
    found = [sorted(folder.rglob(f"{name}.so.*")) for name in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx")]
    if not all(found):
        pytest.skip(f"no TensorRT for RTX in {folder}: {FETCH}")
    return [str(files[-1]) for files in found]


@functools.lru_cache
def shims(major: str) -> Path:
    """Compile the shim under every name that the bindings of one major version link to; return its folder."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc or clang) to build the shim under the bindings with")
    folder = Path(tempfile.mkdtemp(prefix="phreg-shim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in SONAMES:
        soname = f"{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{soname}", "-o", str(folder / soname)]
        done = subprocess.run(
            [*command, str(ROOT / "tests" / "shim.c"), "-ldl"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"{compiler} cannot build the shim under the bindings: {done.stderr.strip()[-300:]}")
    return folder


def inside(version: str, code: str, given: Any = None, *, rtx: bool = False, timeout: float = 600) -> Any:
    """Run ``code`` in a process in which ``import tensorrt`` gives one version of the bindings.

    Args:
        code: reads the variable ``given``, and prints one JSON document as its last line, which is returned.
        rtx: forward to TensorRT for RTX. Otherwise no object of TensorRT can be created.
    """
    major, folder = (NEWEST if version == "lean" else version).partition(".")[0], bindings(version)
    libraries = rtx_libraries() if rtx else ["", ""]
    words = [major, str(shims(major)), str(folder), *libraries]
    done = subprocess.run(
        [sys.executable, "-c", BOOT + code, *words],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Operator:
    """One step of a plan: its kind and kernel, and the ONNX nodes that it computes."""

    kind: str
    kernel: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Census:
    """How a plan computes a graph.

    ``fused_attention``: attentions in one kernel, each counted once per profile. ``eight_bit_attention``: those of them
    whose products take 8 bits. ``eight_bit``: linear layers whose product takes 8 bits from both sides. ``floats``:
    products that are computed from floats, whatever type their operands are stored in; this includes the products of
    attentions that are not fused.
    """

    fused_attention: int
    eight_bit_attention: int
    eight_bit: frozenset[str]
    floats: frozenset[str]


_OPERATOR = re.compile(r'\n[ \t]+([a-z_]+)=\{ name=("[^"]*"|\S+) ([^\n]*?)layers="([^"]*)"')
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PRODUCT = re.compile(r"/MatMul(_\d+)?$")
# Steps that compute a product. Other steps may name a product too, for its epilogue.
_GEMMS = ("fully_connected", "runtime_fusion")
_WEIGHT, _DEQUANTIZE = "/weight/DequantizeLinear", "/DequantizeLinear"


def operators(plan: bytes) -> list[Operator]:
    """Return the steps that a plan lists in its text, in the order in which they run."""
    text = plan.decode("latin1")
    return [Operator(m[1], m[2].strip('"'), tuple(_NODE.findall(m[4]))) for m in _OPERATOR.finditer(text)]


def census(steps: list[Operator]) -> Census:
    """Count the kernels. An 8-bit step names the dequantisation of both operands, which it computes itself."""
    attentions = [step for step in steps if step.kernel.startswith("_gemm_mha")]
    fused = {name for step in attentions for name in _products(step)}
    named: set[str] = set()
    eight: set[str] = set()
    floats: set[str] = set()
    for step in steps:
        if step in attentions:
            continue
        here = _products(step)
        inputs = [node for node in step.nodes if node.endswith(_DEQUANTIZE) and not node.endswith(_WEIGHT)]
        whole = {name for name in here if step.kind == "fully_connected" and inputs and name + _WEIGHT in step.nodes}
        named |= here
        eight |= whole
        floats |= here - whole if step.kind in _GEMMS else set()
    in_eight = [step for step in attentions if any(node.endswith(_DEQUANTIZE) for node in step.nodes)]
    return Census(
        len(attentions), len(in_eight), frozenset(eight - floats), frozenset(floats | (named - eight - fused))
    )


def _products(step: Operator) -> set[str]:
    return {_PRODUCT.sub("", node) for node in step.nodes if _PRODUCT.search(node)}
