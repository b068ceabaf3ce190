"""Find the processor's instructions for 8-bit dot products, and say whether INT8 pays."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

# Flag in Linux's /proc/cpuinfo: the instruction set's usual name.
X86 = {"avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX512-VNNI", "amx_int8": "AMX"}
ARM = {"asimddp": "dot product", "i8mm": "i8mm"}
# Without them a kernel multiplies unsigned by signed bytes and adds two products in 16 bits, where the sum saturates.
# Measured on a ViT-Tiny without VNNI (Zen 3, 2 cores): INT8 27.7 ms, FP32 30.0 ms on ONNX Runtime.
SLOW = "INT8 is about as fast as FP32 here, and less exact; serve the FP32 bundle unless memory decides"

# A session option of ONNX Runtime (pull request 12088). Where sums would saturate it makes weights unsigned, whose
# kernels add in 32 bits; on other processors it changes nothing.
EXACT = ("session.x64quantprecision", "1")


@dataclass(frozen=True)
class EightBits:
    """``names`` of the instruction sets for 8-bit dot products: () for none, None where the system lists none."""

    names: tuple[str, ...] | None

    @property
    def missing(self) -> bool:
        """Whether the processor is known to have none."""
        return self.names == ()

    def __str__(self) -> str:
        if self.names is None:
            return "not known on this system"
        if not self.names:
            return f"none; {SLOW}"
        return f"{', '.join(self.names)}; INT8 is faster than FP32"


def read_eight_bits(cpuinfo: str, machine: str) -> EightBits:
    """The instruction sets of the first core that ``/proc/cpuinfo`` lists.

    Args:
        machine: ``platform.machine()``, e.g. "x86_64" or "aarch64".
    """
    known = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}.get(machine)
    lines = (line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    listed = next((value.split() for key, value in lines if key.strip() in ("flags", "Features")), None)
    if known is None or listed is None:
        return EightBits(None)
    return EightBits(tuple(name for flag, name in known.items() if flag in listed))


@functools.cache
def eight_bits() -> EightBits:
    """The instruction sets of this processor."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        # Every Apple processor since 2020 has FEAT_DotProd.
        return EightBits(("dot product",))
    try:
        return read_eight_bits(Path("/proc/cpuinfo").read_text(errors="replace"), platform.machine())
    except OSError:
        return EightBits(None)


def advice(precision: str) -> str | None:
    """A warning for INT8 on a processor that gains nothing by it, else None."""
    if precision != "int8" or not eight_bits().missing:
        return None
    return f"This processor has no 8-bit dot products (x86: VNNI): {SLOW}."
