"""Measure the latency of a bundle, and record the conditions that it depends on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.images.photographs import resizes_fast
from phreg_deploy.profiling.report import BatchLatency, Conditions, Latency, ProfileReport
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.backends.interface import DeviceBackend
from phreg_deploy.runtime.features import FeatureExtractor

# Rounds that are always measured, and calls that warm up.
LEAST, WARM = 10, 3
# The medians of the two halves of a stable run differ by at most this share of the whole run's median.
SPREAD = 0.25


def measure(calls: dict[str, Callable[[], object]], seconds: float, progress: Progress) -> dict[str, Latency]:
    """Time several calls in turn, A B C A B C: a machine whose speed drifts then slows all of them alike.

    Args:
        seconds: of measuring in all, after the warm-up; at least ``LEAST`` rounds.
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


def measure_bundle(
    extractor: FeatureExtractor,
    *,
    batches: list[int] | None,
    size: tuple[int, int] | None,
    seconds: float,
    threads: int | None,
    mode: str = "latency",
    progress: Progress,
    frame: tuple[int, int] = (480, 640),
    clocks: dict[str, Any] | None = None,
) -> ProfileReport:
    """Measure, for each batch, the graph alone, the extractor around it, and preprocessing.

    Args:
        frame: (height, width) of the array that preprocessing is measured on, one image per call.
        clocks: of a GPU, see ``Telemetry.clocks``.
    """
    cases = measured_cases(extractor.manifest, batches, size)
    rng = np.random.default_rng(0)
    photograph = rng.integers(0, 256, (*frame, 3), dtype=np.uint8)
    results = []
    for batch, (height, width) in cases:
        images = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        calls: dict[str, Callable[[], object]] = {
            "graph": extractor.graph_call(images),
            "extractor": partial(extractor.dense, images),
            "preprocess": partial(extractor.prepare, photograph, (height, width)),
        }
        results.append(_batch_latency(batch, (height, width), measure(calls, seconds, progress)))
    return ProfileReport(conditions(extractor, threads, mode, frame, cases[0][1], clocks), results)


def _batch_latency(batch: int, size: tuple[int, int], timed: dict[str, Latency]) -> BatchLatency:
    graph, extractor, preprocess = (timed[part].p50 for part in ("graph", "extractor", "preprocess"))
    return BatchLatency(
        batch,
        size,
        **timed,
        overhead=extractor / graph - 1,
        images_per_second=1e3 * batch / extractor,
        preprocess_share=batch * preprocess / (batch * preprocess + extractor),
    )


def measured_cases(
    manifest: Manifest, batches: list[int] | None, size: tuple[int, int] | None
) -> list[tuple[int, tuple[int, int]]]:
    """List the batches and (height, width) to measure; by default the bundle's best batch at its default size.

    Raises:
        PhregError: the bundle does not serve one of them.
    """
    size = size or manifest.sizes.default
    manifest.sizes.check(size, manifest.model.patch)
    batches = list(dict.fromkeys(batches or [manifest.batches.best]))
    for batch in batches:
        manifest.batches.check(batch)
    return [(batch, size) for batch in batches]


def conditions(
    extractor: FeatureExtractor,
    threads: int | None,
    mode: str,
    frame: tuple[int, int],
    size: tuple[int, int],
    clocks: dict[str, Any] | None = None,
) -> Conditions:
    """Record what the figures depend on; preprocessing resizes ``frame`` to ``size``, both (height, width)."""
    manifest, backend = extractor.manifest, extractor.opened
    gpu = backend.cuda.gpu if isinstance(backend, DeviceBackend) else None
    fast = resizes_fast(frame[::-1], size, extractor.preprocess)
    return Conditions(
        processor=processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        load=list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        system=platform.platform(),
        python=platform.python_version(),
        backend=extractor.backend,
        compute=extractor.compute,
        choice=extractor.choice,
        backend_version=backend_version(extractor.backend),
        threads=threads,
        mode=mode,
        gpu=None if gpu is None else gpu.kind,
        driver=None if gpu is None else gpu.driver,
        clocks=clocks,
        precision=manifest.precision,
        model=manifest.model.architecture,
        registers=manifest.model.registers,
        random_weights=manifest.random_weights,
        graph_sha256=manifest.files.get("model.onnx"),
        photograph=f"{frame[1]}x{frame[0]} noise",
        resize="fast" if fast else "Pillow",
    )


def backend_version(name: str) -> str:
    """Name and version of the package behind a backend."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {"openvino": ("openvino",), "tensorrt": ("tensorrt", "tensorrt-lean")}
    for package in packages.get(name, ("onnxruntime-gpu", "onnxruntime")):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return name


def processor() -> str:
    """Name of the processor, from /proc/cpuinfo where it is there."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
