"""The settings of one calibration, checked before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phreg_deploy.arguments import EIGHT_BITS, check_cosine, check_pattern
from phreg_deploy.bundle.gates import GATES
from phreg_deploy.errors import PhregError
from phreg_deploy.quantisation import Smoothing

TARGETS = ("cpu", "trt")


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate and how; ``phreg_deploy.calibration.calibrate`` explains every field.

    Raises:
        PhregError: a setting that no bundle and no image can satisfy.
    """

    bundle: Path
    images: Path
    mode: str = "int8"
    target: str = "cpu"
    float_macs: float = 0.1
    cosine_p1: float | None = None
    smoothing: Smoothing | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in EIGHT_BITS:
            raise PhregError(f"mode: got {self.mode!r}, expected {' or '.join(EIGHT_BITS)}.")
        if self.target not in TARGETS:
            raise PhregError(f"target: got {self.target!r}, expected {' or '.join(TARGETS)}.")
        if self.mode == "fp8" and self.target != "trt":
            raise PhregError("target: got cpu, but no processor computes in FP8; use --target trt, or --mode int8.")
        for expression in self.keep:
            check_pattern(expression)
        if self.keep and self.target != "trt":
            raise PhregError("keep in FP32: with --target cpu everything around the 8 bits is FP32 already.")
        if not 0 <= self.float_macs <= 1:
            raise PhregError(f"float MACs: got {self.float_macs}, expected a share from 0 to 1, e.g. 0.1.")
        check_cosine(self.cosine_p1)

    @property
    def bars(self) -> dict[str, float]:
        """The mode's bars, with the user's 1st-percentile patch cosine in place of its own."""
        own = {} if self.cosine_p1 is None else {"cosine_p1": self.cosine_p1}
        return {**GATES[self.mode], **own}
