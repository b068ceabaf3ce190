"""``Limits``: the bounds of a stream, and the windows over which they are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phreg_deploy.errors import PhregError


@dataclass(frozen=True)
class Limits:
    """Bounds of a stream; each raises an alarm when it is exceeded, and again after it was kept in between.

    ``deadline``: seconds from the capture of a frame to its features, or None. ``late_share``: share (0-1) of frames
    that may miss it. ``artifact_rate``: mean artifact rate (0-1), or None. ``no_frame``: seconds without a frame from
    a source. ``slow_run``: seconds of one run of the graph. ``window``: results over which latency, shares and rates
    are computed; ``least``: results before which shares and rates raise no alarm.

    Raises:
        PhregError: a value out of bounds.
    """

    deadline: float | None = None
    late_share: float = 0.1
    artifact_rate: float | None = None
    no_frame: float = 5.0
    slow_run: float = 10.0
    window: int = 300
    least: int = 20

    def __post_init__(self) -> None:
        for name in ("deadline", "no_frame", "slow_run"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PhregError(f"{name.replace('_', '-')}: got {value} s, expected more than 0.")
        for name in ("late_share", "artifact_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise PhregError(f"{name.replace('_', '-')}: got {value}, expected a share from 0 to 1.")
        if not 1 <= self.least <= self.window:
            raise PhregError(f"limits: got least {self.least}, window {self.window}; expected 1 <= least <= window.")
