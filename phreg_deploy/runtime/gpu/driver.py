"""Whether this machine has an NVIDIA driver."""

from __future__ import annotations

import ctypes
import sys


def driver_present() -> bool:
    """Whether there is an NVIDIA driver at all: without one nothing on a GPU is worth a try."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
