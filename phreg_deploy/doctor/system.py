"""Where ``doctor`` looks: packages, libraries, separate Python processes, and the files that describe a Jetson."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phreg_deploy.runtime.gpu.jetson import is_jetson, read_l4t, read_text
from phreg_deploy.spec import Stored

# An environment that sees what JetPack installed for the system's Python.
VENV = "python3 -m venv --system-site-packages .venv"
SYSTEM_FOLDERS = (
    "usr/lib/*-linux-gnu",
    "usr/lib/*-linux-gnu/nvidia",
    "usr/lib64",
    "usr/local/lib",
    "usr/local/cuda/lib64",
    "usr/local/tensorrt*/lib",
    "usr/local/TensorRT*/lib",
)


@dataclass(frozen=True)
class Finding(Stored):
    """One part of this machine: its ``state`` as a sentence, and in ``mend`` what to type; None if nothing is wrong."""

    part: str
    state: str
    usable: bool
    purpose: str
    mend: str | None = None


@dataclass(frozen=True)
class Part:
    """A part of this machine, and the commands that need it."""

    name: str
    purpose: str

    def usable(self, state: str) -> Finding:
        return Finding(self.name, state, True, self.purpose)

    def unusable(self, state: str, fix: str | None = None) -> Finding:
        return Finding(self.name, state, False, self.purpose, fix)


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def attempt(code: str, seconds: int = 60) -> tuple[bool, str]:
    """Run Python code in a separate process, which a broken library may crash: (worked, last line of its output)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


@dataclass(frozen=True)
class System:
    """This machine; tests replace it. ``sites``: folders that Python imports from. ``path``: LD_LIBRARY_PATH."""

    root: Path = Path("/")
    library: Callable[[str], Any] = ctypes.CDLL
    version: Callable[[str], str | None] = installed
    attempt: Callable[[str], tuple[bool, str]] = attempt
    sites: tuple[Path, ...] = field(default_factory=lambda: tuple(Path(p) for p in sys.path if p))
    path: str = field(default_factory=lambda: os.environ.get("LD_LIBRARY_PATH", ""))
    processor: str = field(default_factory=platform.machine)

    @functools.cached_property
    def pip_folders(self) -> list[Path]:
        """Folders in which NVIDIA's wheels keep their libraries."""
        return [f for site in self.sites for pattern in ("nvidia/*/lib", "tensorrt_libs") for f in site.glob(pattern)]

    @functools.cached_property
    def folders(self) -> list[Path]:
        system = [f for pattern in SYSTEM_FOLDERS for f in self.root.glob(pattern)]
        return [*self.pip_folders, *(Path(p) for p in self.path.split(":") if p), *system]

    def finds(self, name: str) -> bool:
        """Whether a wheel or the loader has the library. A wheel's library is not opened: some take 700 MB."""
        if any((folder / name).is_file() for folder in self.pip_folders):
            return True
        try:
            return self.library(name) is not None
        except OSError:
            return False


@dataclass(frozen=True)
class Jetson:
    """A Jetson, read from its own files. ``jetpack``: the numbers of its version that are certain, perhaps none."""

    model: str
    l4t: str
    jetpack: tuple[int, ...]

    def __str__(self) -> str:
        version = f"JetPack {'.'.join(map(str, self.jetpack))}" if self.jetpack else "JetPack of unknown version"
        return ", ".join(part for part in (version, f"L4T {self.l4t}" if self.l4t else "", self.model) if part)

    def refusal(self, tensorrt: tuple[int, ...]) -> str | None:
        """Why this version of TensorRT does not run here, from NVIDIA's release notes; None if no note excludes it."""
        if tensorrt < (11,):
            return None
        if self.jetpack[:1] == (6,):
            return "JetPack 6.x stays on TensorRT 10.x (6.2 ships 10.3)"
        if tensorrt < (11, 4, 1):
            return "TensorRT 11.0 to 11.4.0 do not support Jetson; 11.4.1 is the first, and JetPack 7.2 ships 10.16.2"
        if self.jetpack and self.jetpack < (7, 2, 2):
            return "TensorRT from 11.4.1 on needs JetPack 7.2.2 or newer"
        return None


def read_jetson(root: Path) -> Jetson | None:
    """The Jetson that this machine is, or None."""
    if not is_jetson(root):
        return None
    l4t = read_l4t(root) or ()
    jetpack = _installed_jetpack(root)
    if not jetpack and l4t[:1] == (39,):
        # R39.2.0 is JetPack 7.2 and R39.2.1 is 7.2.1; R38 was 7.0 and 7.1.
        jetpack = (7, *l4t[1:])
    elif not jetpack and l4t:
        jetpack = {35: (5,), 36: (6,), 38: (7,)}.get(l4t[0], ())
    return Jetson(read_text(root / "proc/device-tree/model"), ".".join(map(str, l4t)), jetpack)


def _installed_jetpack(root: Path) -> tuple[int, ...]:
    """Version of the package nvidia-jetpack, by dpkg; () if it is not installed."""
    stanzas = read_text(root / "var/lib/dpkg/status").split("\n\n")
    package = next((s for s in stanzas if "Package: nvidia-jetpack\n" in f"{s}\n" and " installed" in s), "")
    version = re.search(r"^Version: ([\d.]+)", package, re.MULTILINE)
    return tuple(int(number) for number in re.findall(r"\d+", version[1])) if version else ()
