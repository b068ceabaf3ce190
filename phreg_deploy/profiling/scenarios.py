"""Load a bundle as the scenarios of MLPerf Inference do.

The definitions are those of "Scenarios" in MLPerf's inference rules (github.com/mlcommons/inference_policies):

- SingleStream: the next query, of one sample, is sent as soon as the one before is complete; the metric is the 90th
  percentile of the latencies; at least 600 seconds and, for an early stop, 64 queries.
- Offline: all samples, at least 24,576, are sent at once in one query; the metric is the throughput; at least 600
  seconds.

A sample is one image at the input size, in the host's memory, and the result is features there: MLPerf counts the
transfers and not the preprocessing. These are our own runs and no MLPerf results; MLPerf's own early-stopping estimate
is a little above the percentile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling.report import ScenarioResult
from phreg_deploy.profiling.timing import describe
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.features import FeatureExtractor

SINGLE_STREAM, OFFLINE = "single-stream", "offline"
SCENARIOS = (SINGLE_STREAM, OFFLINE)
# Seconds, queries and samples of a query that MLPerf wants at least.
RULES = {
    SINGLE_STREAM: {"seconds": 600.0, "queries": 64, "samples": 1},
    OFFLINE: {"seconds": 600.0, "queries": 1, "samples": 24_576},
}
# Different images that samples are drawn from, in memory from the start; MLPerf's performance set has at least 64.
IMAGES = 64
# Calls before the first query: contexts, CUDA graphs, caches.
WARM = 5


def run_scenario(
    extractor: FeatureExtractor, name: str, *, seconds: float, size: tuple[int, int], threads: int, progress: Progress
) -> ScenarioResult:
    """Run one scenario for at least ``seconds``.

    Args:
        name: of ``SCENARIOS``.
        size: (height, width) of the images.
        threads: that share the samples of "offline"; each runs the bundle's best batch.

    Raises:
        PhregError: another name, or a bundle that does not serve single images for "single-stream".
    """
    if name not in SCENARIOS:
        raise PhregError(f"scenario: got {name!r}, expected {' or '.join(SCENARIOS)}.")
    batches = extractor.manifest.batches
    if name == SINGLE_STREAM and batches.lowest > 1:
        raise PhregError(
            f"scenario: single-stream sends single images, and this bundle serves {batches.lowest} or more. Export it "
            "with --batch 1."
        )
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *size, 3), dtype=np.uint8)
    with progress.task(name, None):
        if name == SINGLE_STREAM:
            return _single_stream(extractor.run, images, seconds)
        return _offline(extractor.run, images, batches.best, threads, seconds)


def _single_stream(run: Callable[[Any], object], images: np.ndarray, seconds: float) -> ScenarioResult:
    for i in range(WARM):
        run(images[i : i + 1])
    least, latencies, start = int(RULES[SINGLE_STREAM]["queries"]), list[float](), time.perf_counter()
    now = start
    while now - start < seconds or len(latencies) < least:
        sent = now
        at = len(latencies) % IMAGES
        run(images[at : at + 1])
        now = time.perf_counter()
        latencies.append(1e3 * (now - sent))
    value = float(np.percentile(latencies, 90))
    minimum = {"seconds": seconds, "queries": least, "samples": 1}
    how = {"queries": len(latencies), "samples": len(latencies), "batch": 1, "threads": 1, "seconds": now - start}
    return _result(SINGLE_STREAM, "90th percentile latency in ms", value, minimum, latencies, how)


def _offline(
    run: Callable[[Any], object], images: np.ndarray, batch: int, threads: int, seconds: float
) -> ScenarioResult:
    """Send one query of as many samples as take about ``seconds``, by a trial of a tenth of them."""
    batches = [np.ascontiguousarray(np.resize(images[i:], (batch, *images.shape[1:]))) for i in range(0, IMAGES, batch)]
    trial = max(1, threads) * WARM
    rate = trial / _serve(run, batches, trial, threads)
    trial = max(trial, int(0.1 * seconds * rate))
    rate = trial / _serve(run, batches, trial, threads)
    count, took = max(threads, int(1.1 * seconds * rate) + 1), 0.0
    # A machine that became faster since the trial gets a longer query, which is measured on its own.
    while took < seconds:
        took = _serve(run, batches, count, threads)
        count, sent = int(1.2 * count * max(1.0, seconds / took)) + 1, count
    samples = sent * batch
    minimum = {"seconds": seconds, "queries": 1, "samples": samples}
    how = {"queries": 1, "samples": samples, "batch": batch, "threads": threads, "seconds": took}
    return _result(OFFLINE, "samples per second", samples / took, minimum, [1e3 * took], how)


def _serve(run: Callable[[Any], object], batches: list[np.ndarray], count: int, threads: int) -> float:
    """Seconds in which ``threads`` threads run ``count`` batches. Raises the first error of any."""
    work, lock, errors = iter(range(count)), threading.Lock(), list[BaseException]()

    def numbers() -> Iterator[int]:
        while not errors:
            with lock:
                number = next(work, None)
            if number is None:
                return
            yield number

    def serve() -> None:
        try:
            for number in numbers():
                run(batches[number % len(batches)])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=serve, name="offline") for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started


def _result(
    name: str, metric: str, value: float, minimum: dict[str, Any], latencies: list[float], how: dict[str, Any]
) -> ScenarioResult:
    rules = RULES[name]
    done = {"seconds": how["seconds"], "queries": how["queries"], "samples": how["samples"] / how["queries"]}
    return ScenarioResult(
        scenario=name,
        metric=metric,
        value=value,
        **how,
        minimum_seconds=minimum["seconds"],
        minimum_queries=minimum["queries"],
        minimum_samples=minimum["samples"],
        rules=dict(rules),
        meets_rules=all(done[key] >= rules[key] for key in rules),
        latency=describe(latencies),
    )
