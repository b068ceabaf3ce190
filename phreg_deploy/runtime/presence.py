"""What is there, asked without importing or starting it."""

from __future__ import annotations

import ctypes
import importlib.util
import sys


def found(module: str) -> bool:
    if module in sys.modules:  # which find_spec would ask for its origin; None stands for "blocked"
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def driver_present() -> bool:
    """Whether there is an NVIDIA driver at all: without one nothing on a GPU is worth a try."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
