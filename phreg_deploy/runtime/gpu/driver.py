"""Look for an NVIDIA driver."""

from __future__ import annotations

import ctypes
import sys


def driver_present() -> bool:
    """Whether the NVIDIA driver's library can be loaded."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
