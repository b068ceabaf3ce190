"""The options of a backend beside its name."""

from __future__ import annotations

from dataclasses import dataclass

from phreg_deploy.errors import PhregError

COMPUTE, MODES = ("auto", "fp32", "bf16"), ("latency", "throughput")


@dataclass(frozen=True)
class BackendOptions:
    """How a backend runs a graph.

    ``threads`` for one inference; None leaves the number to the runtime. ``compute``: the precision of all layers that
    are not in 8 bits; "auto" is the fastest that passes the bundle's gates. ``mode``: "latency" of one call, or
    "throughput" of calls from several threads. ``device``: the number of the GPU, where the backend uses one.

    Raises:
        PhregError: an unknown value.
    """

    threads: int | None = None
    compute: str = "auto"
    mode: str = "latency"
    device: int = 0

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise PhregError(f"threads: got {self.threads}, expected at least 1.")
        if self.compute not in COMPUTE:
            raise PhregError(f"compute: got {self.compute!r}, expected {', '.join(COMPUTE)}.")
        if self.mode not in MODES:
            raise PhregError(f"mode: got {self.mode!r}, expected {' or '.join(MODES)}.")
