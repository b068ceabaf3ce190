"""Time the inferences of a GPU until they are stable, and describe the times by percentiles."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from phreg_deploy.profiling.report import Entry
from phreg_deploy.progress import Progress

# Inferences that are always measured.
LEAST = 10
# Windows whose means must agree within AGREE (5 %), and windows at most until they do.
WINDOWS, PATIENCE, AGREE = 3, 9, 0.05
RESAMPLES, CONFIDENCE = 1000, 95


def measure(
    calls: Mapping[Any, Callable[[], dict[str, float]]], seconds: float, warmup_ms: float, progress: Progress
) -> dict[Any, Entry]:
    """Time inferences in turn, A B B A, until the means of the last three windows agree.

    Args:
        calls: name -> an inference that returns milliseconds by part, "latency" among them.
        seconds: of three windows together; at least ``LEAST`` inferences of each call, at most ``PATIENCE`` windows.

    Returns:
        Name -> part -> ``describe`` of the last three windows, and ``stable`` and ``windows`` (how many were measured);
        ``calls`` of the latency counts all inferences, also those that warmed up.
    """
    warm = {name: _warm_up(call, warmup_ms) for name, call in calls.items()}
    windows: list[dict[Any, list[dict[str, float]]]] = []
    agree = dict.fromkeys(calls, False)
    with progress.task("measuring", PATIENCE) as advance:
        while len(windows) < PATIENCE and not all(agree.values()):
            windows.append(_measure_window(calls, seconds / WINDOWS))
            advance()
            for name in calls:
                agree[name] = is_stable([float(np.mean([t["latency"] for t in window[name]])) for window in windows])
    report = {}
    for name in calls:
        inferences = [times for window in windows[-WINDOWS:] for times in window[name]]
        parts = {part: describe(times[part] for times in inferences) for part in inferences[0]}
        parts["latency"]["calls"] = warm[name] + sum(len(window[name]) for window in windows)
        report[name] = {**parts, "stable": agree[name], "windows": len(windows)}
    return report


def _warm_up(call: Callable[[], object], milliseconds: float) -> int:
    """Call at least once, for ``milliseconds``; return how often."""
    until, count = time.perf_counter() + 1e-3 * milliseconds, 0
    while count == 0 or time.perf_counter() < until:
        call()
        count += 1
    return count


def _measure_window(
    calls: Mapping[Any, Callable[[], dict[str, float]]], seconds: float
) -> dict[Any, list[dict[str, float]]]:
    window: dict[Any, list[dict[str, float]]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    for turn in itertools.count():
        for name in calls if turn % 2 == 0 else reversed(list(calls)):
            window[name].append(calls[name]())
        if time.perf_counter() >= until and WINDOWS * (turn + 1) >= LEAST:
            break
    return window


def is_stable(means: list[float]) -> bool:
    """Whether the means of the last three windows differ by less than ``AGREE``; False with fewer windows."""
    last = means[-WINDOWS:]
    return len(last) == WINDOWS and max(last) < (1 + AGREE) * min(last)


def describe(values: Iterable[float]) -> Entry:
    """Percentiles and spread of times, in the unit of the times, and the confidence interval of the median."""
    times = np.asarray(list(values), dtype=np.float64)
    quantiles = dict(zip(("p50", "p90", "p95", "p99", "p99.9"), np.percentile(times, (50, 90, 95, 99, 99.9)).tolist()))
    return {
        "rounds": len(times),
        "min": float(times.min()),
        "mean": float(times.mean()),
        **quantiles,
        "max": float(times.max()),
        "std": float(times.std()),
        "p50_interval": bootstrap(times),
    }


def bootstrap(times: np.ndarray) -> list[float]:
    """Lower and upper end of the ``CONFIDENCE`` % interval of the median of ``(N,)`` times, by resampling.

    Only the rank of each resample's median is drawn, which is beta distributed: this is exact, and its cost does not
    grow with the run. The seed is fixed.
    """
    rng, ordered, count = np.random.default_rng(0), np.sort(times), len(times)
    rank = (count + 1) // 2
    low = rng.beta(rank, count + 1 - rank, RESAMPLES)
    high = low if count % 2 else low + (1 - low) * rng.beta(1, count - rank, RESAMPLES)
    picked = [ordered[np.minimum((count * side).astype(int), count - 1)] for side in (low, high)]
    rest = (100 - CONFIDENCE) / 2
    return np.percentile(np.mean(picked, axis=0), (rest, 100 - rest)).tolist()  # type: ignore[no-any-return]
