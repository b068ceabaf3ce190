"""Measure latency and throughput of a bundle on this machine, and on a GPU also its layers, memory and energy.

Importing this module imports neither numpy nor a runtime.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from phreg_deploy.profiling.report import ProfileReport

__all__ = ["profile"]
LARGEST_FRAME = 16_384
# Least seconds of measuring, and images per second.
SHORTEST, SLOWEST = 0.01, 0.1


def profile(
    bundle: Path | str,
    *,
    backend: str = "auto",
    threads: int | None = None,
    compute: str = "auto",
    mode: str = "latency",
    device: int = 0,
    batches: Sequence[int] | None = None,
    image_size: tuple[int, int] | None = None,
    frame: tuple[int, int] = (480, 640),
    seconds: float = 5.0,
    streams: Sequence[int] = (1, 2, 4),
    fps: float | None = None,
    without: Path | str | None = None,
    scenarios: Sequence[str] = (),
    baseline: Path | None = None,
    tolerance: float = 0.1,
    allow_other_conditions: bool = False,
    progress: Progress = SILENT,
) -> ProfileReport:
    """Measure the latency of a bundle: the graph alone, the extractor around it, and preprocessing; interleaved.

    On a GPU also the parts of an inference with and without CUDA graph, streams, layers, memory, power and a roofline.

    Args:
        backend: a backend's name, or "auto" for the fastest that passes the exam.
        threads, compute, mode, device: see ``BackendOptions``.
        batches: batch sizes; None for the bundle's best.
        image_size: (height, width) in pixels; None for the bundle's default.
        frame: (height, width) of the frame that preprocessing is measured on.
        seconds: of measuring per batch, after the warm-up.
        streams: on a GPU, numbers of threads that call at once.
        fps: on a GPU, feed images at this rate and count missed deadlines.
        without: on a GPU, a bundle of the same model without registers, to measure what they cost.
        scenarios: "single-stream" and "offline", as MLPerf Inference defines them, for at least ``seconds`` each.
        baseline: an earlier report, written by ``phreg-deploy profile --json``; its conditions are compared first.
        tolerance: growth of a median over the baseline's that is allowed; ``ProfileReport.slower`` lists the rest.
        allow_other_conditions: compare with a baseline that was measured under other conditions.

    Raises:
        BackendMissing: the backend is not installed, or there is no GPU.
        PhregError: a bad argument, bundle or baseline, or a baseline of other conditions.
    """
    from phreg_deploy.errors import PhregError

    if not 1 <= min(frame) <= max(frame) <= LARGEST_FRAME:
        got = f"{frame[0]}x{frame[1]}"
        raise PhregError(f"frame: got {got}, expected sides of 1 to {LARGEST_FRAME} pixels.")
    for name, value, least in (("seconds", seconds, SHORTEST), ("fps", fps, SLOWEST), ("tolerance", tolerance, 0)):
        if value is not None and not (math.isfinite(value) and value >= least):
            raise PhregError(f"{name}: got {value}, expected a number from {least} on.")
    from phreg_deploy.profiling.baseline import Baseline
    from phreg_deploy.profiling.profiler import ProfileRequest, profile_bundle
    from phreg_deploy.profiling.scenarios import SCENARIOS
    from phreg_deploy.runtime.backends.options import BackendOptions

    unknown = [name for name in scenarios if name not in SCENARIOS]
    if unknown:
        raise PhregError(f"scenario: got {unknown[0]!r}, expected {' or '.join(SCENARIOS)}.")
    request = ProfileRequest(
        bundle=Path(bundle),
        backend=backend,
        options=BackendOptions(threads, compute, mode, device),
        batches=list(batches) if batches else None,
        size=image_size,
        frame=frame,
        seconds=seconds,
        streams=list(streams),
        fps=fps,
        without=None if without is None else Path(without),
        scenarios=tuple(scenarios),
    )
    before = None if baseline is None else Baseline.read(baseline)
    return profile_bundle(request, before, tolerance, allow_other_conditions, progress)
