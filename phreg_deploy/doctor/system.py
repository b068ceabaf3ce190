"""Whom ``doctor`` asks: packages, libraries, processes of their own, and the files by which a Jetson tells what it is."""

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

from phreg_deploy.spec import Stored

VENV = "python3 -m venv --system-site-packages .venv"  # sees what JetPack installed for the system's Python
SYSTEM_FOLDERS = (
    "usr/lib/*-linux-gnu", "usr/lib/*-linux-gnu/nvidia", "usr/lib64", "usr/local/lib", "usr/local/cuda/lib64",
    "usr/local/tensorrt*/lib", "usr/local/TensorRT*/lib",
)  # fmt: skip


@dataclass(frozen=True)
class Finding(Stored):
    """``state`` in words; ``usable``; ``mend``: what to type, None where nothing is wrong."""

    part: str
    state: str
    usable: bool
    purpose: str
    mend: str | None = None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def attempt(code: str, seconds: int = 60) -> tuple[bool, str]:
    """Run Python in a process of its own, which a broken library may crash: (worked, last line of what it said)."""
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
    """Whom to ask; tests give their own. ``sites``: folders that Python imports from."""

    root: Path = Path("/")
    library: Callable[[str], Any] = ctypes.CDLL
    version: Callable[[str], str | None] = installed
    attempt: Callable[[str], tuple[bool, str]] = attempt
    sites: tuple[Path, ...] = field(default_factory=lambda: tuple(Path(p) for p in sys.path if p))
    path: str = field(default_factory=lambda: os.environ.get("LD_LIBRARY_PATH", ""))
    processor: str = field(default_factory=platform.machine)

    @functools.cached_property
    def pip_folders(self) -> list[Path]:
        """Where NVIDIA's wheels keep their libraries."""
        return [f for site in self.sites for pattern in ("nvidia/*/lib", "tensorrt_libs") for f in site.glob(pattern)]

    @functools.cached_property
    def folders(self) -> list[Path]:
        system = [f for pattern in SYSTEM_FOLDERS for f in self.root.glob(pattern)]
        return [*self.pip_folders, *(Path(p) for p in self.path.split(":") if p), *system]

    def finds(self, name: str) -> bool:
        """Whether a wheel or the loader has the library. Of a wheel the file is enough: some take 700 MB to open."""
        if any((folder / name).is_file() for folder in self.pip_folders):
            return True
        try:
            return self.library(name) is not None
        except OSError:
            return False


@dataclass(frozen=True)
class Jetson:
    """A Jetson by its own files. ``jetpack``: as many numbers of the version as are known for sure, perhaps none."""

    model: str
    l4t: str
    jetpack: tuple[int, ...]

    def __str__(self) -> str:
        version = f"JetPack {'.'.join(map(str, self.jetpack))}" if self.jetpack else "JetPack of unknown version"
        return ", ".join(part for part in (version, f"L4T {self.l4t}" if self.l4t else "", self.model) if part)

    def refusal(self, tensorrt: tuple[int, ...]) -> str | None:
        """Why this version of TensorRT does not run here, by NVIDIA's release notes; None where nothing speaks against it."""
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
    """The Jetson that this is, or None. A container may lack all but the device tree."""
    release, compatible = read_text(root / "etc/nv_tegra_release"), read_text(root / "proc/device-tree/compatible")
    if not release and "nvidia,tegra" not in compatible:
        return None
    said = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", release)
    l4t = tuple(int(n) for n in re.findall(r"\d+", f"{said[1]}.{said[2]}")) if said else ()
    stanzas = read_text(root / "var/lib/dpkg/status").split("\n\n")
    package = next((s for s in stanzas if "Package: nvidia-jetpack\n" in f"{s}\n" and " installed" in s), "")
    told = re.search(r"^Version: ([\d.]+)", package, re.MULTILINE)
    if told:
        jetpack = tuple(int(n) for n in re.findall(r"\d+", told[1]))
    else:  # R39.2.0 is JetPack 7.2 and R39.2.1 is 7.2.1; R38 was 7.0 and 7.1
        jetpack = (7, *l4t[1:]) if l4t[:1] == (39,) else {35: (5,), 36: (6,), 38: (7,)}.get(l4t[0] if l4t else 0, ())
    return Jetson(read_text(root / "proc/device-tree/model").strip("\0\n "), ".".join(map(str, l4t)), jetpack)


def read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
