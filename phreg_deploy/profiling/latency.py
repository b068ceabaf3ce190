"""Latency of a bundle on this machine: warm-up, interleaved configurations, percentiles, and the conditions they hold in."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.images.photographs import resizes_fast
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.backends.interface import DeviceBackend
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.spec import Stored

LEAST = 10  # rounds, however slow
WARM = 3
FRAME = (480, 640)  # height, width
SPREAD = 0.25  # of the median between the halves of a run; beyond it the figures are called unstable


@dataclass(frozen=True)
class Latency(Stored):
    """Milliseconds per call. ``stable``: the medians of the first and second half differ by less than ``SPREAD``."""

    rounds: int
    minimum: float
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float
    stable: bool


def measure(calls: dict[str, Callable[[], object]], seconds: float, progress: Progress) -> dict[str, Latency]:
    """Time several calls in turn, A B C A B C, so that a machine whose speed drifts treats them alike.

    Args:
        seconds: of measuring in all, after the warm-up; at least ``LEAST`` rounds are made.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with progress.task("measuring", 100) as advance:
        for call in calls.values():
            for _ in range(WARM):
                call()
        start, shown = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds or len(next(iter(times.values()))) < LEAST:
            for name, call in calls.items():
                before = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - before))
            done = min(100, int(100 * spent / seconds))
            advance(done - shown)
            shown = done
        advance(100 - shown)
    return {name: summarise(values) for name, values in times.items()}


def summarise(values: list[float]) -> Latency:
    """Percentiles of single-call times in milliseconds."""
    half = len(values) // 2
    first, second = float(np.median(values[:half] or values)), float(np.median(values[half:]))
    p50, p90, p99 = (float(q) for q in np.percentile(values, (50, 90, 99)))
    stable = abs(first - second) <= SPREAD * p50
    return Latency(len(values), min(values), float(np.mean(values)), p50, p90, p99, max(values), stable)


def profile_bundle(
    extractor: FeatureExtractor,
    *,
    batches: list[int] | None,
    size: tuple[int, int] | None,
    seconds: float,
    threads: int | None,
    mode: str = "latency",
    progress: Progress,
    frame: tuple[int, int] = FRAME,
) -> dict[str, Any]:
    """Latency and throughput for each batch: the bare graph, the extractor around it, and preprocessing apart.

    Args:
        frame: (height, width) of the array that preprocessing is measured on, one image a call.

    Returns:
        ``conditions`` and ``results``: per batch ``graph``, ``extractor`` and ``preprocess`` latencies, ``overhead``
        (median extractor over median graph - 1), ``images_per_second`` of the extractor, and ``preprocess_share``: of the
        time from frames to features, preprocessing included.
    """
    cases = measured_cases(extractor.manifest, batches, size)
    rng = np.random.default_rng(0)
    photograph = rng.integers(0, 256, (*frame, 3), dtype=np.uint8)
    resize = "fast" if resizes_fast(frame[::-1], cases[0][1], extractor.preprocess) else "Pillow"
    results = []
    for batch, size in cases:
        images = rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8)
        timed = measure(
            {
                "graph": extractor.graph_call(images),
                "extractor": lambda images=images: extractor.dense(images),  # type: ignore[misc]
                "preprocess": lambda size=size: extractor.prepare(photograph, size),  # type: ignore[misc]
            },
            seconds, progress,
        )  # fmt: skip
        preparing = batch * timed["preprocess"].p50
        results.append({
            "batch": batch, "size": list(size), **{name: latency.to_json() for name, latency in timed.items()},
            "overhead": timed["extractor"].p50 / timed["graph"].p50 - 1, "images_per_second": 1e3 * batch / timed["extractor"].p50,
            "preprocess_share": preparing / (preparing + timed["extractor"].p50),
        })  # fmt: skip
    return {
        "conditions": {
            **conditions(extractor, threads, mode),
            "photograph": f"{frame[1]}x{frame[0]} noise",
            "resize": resize,
        },
        "results": results,
    }


def measured_cases(
    manifest: Manifest, batches: list[int] | None, size: tuple[int, int] | None
) -> list[tuple[int, tuple[int, int]]]:
    """The batches and (height, width) that are to be measured; by default the bundle's best batch at its default size.

    Raises:
        PhregError: one of them is not served; nothing was measured yet.
    """
    size = size or manifest.sizes.default
    manifest.sizes.check(size, manifest.model.patch)
    batches = list(dict.fromkeys(batches or [manifest.batches.best]))
    for batch in batches:
        manifest.batches.check(batch)
    return [(batch, size) for batch in batches]


def conditions(extractor: FeatureExtractor, threads: int | None, mode: str = "latency") -> dict[str, Any]:
    """What the figures depend on: the machine, its load, the versions, the bundle."""
    manifest, backend = extractor.manifest, extractor.opened
    return {
        "processor": processor(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None, "system": platform.platform(), "python": platform.python_version(),
        "backend": extractor.backend, "compute": extractor.compute, "choice": extractor.choice, "backend_version": backend_version(extractor.backend), "threads": threads, "mode": mode, "gpu": backend.cuda.gpu.name if isinstance(backend, DeviceBackend) else None,
        "precision": manifest.precision, "model": manifest.model.architecture, "registers": manifest.model.registers,
        "random_weights": manifest.random_weights, "graph_sha256": manifest.files.get("model.onnx"),
    }  # fmt: skip


def backend_version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    packages = {"openvino": ("openvino",), "tensorrt": ("tensorrt", "tensorrt-lean")}
    for package in packages.get(name, ("onnxruntime-gpu", "onnxruntime")):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return name


def processor() -> str:
    """The processor's own name, where the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
