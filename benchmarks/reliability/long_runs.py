"""Run one process for long: frames through an extractor and a stream, and bundles loaded and closed again and again.

Resident memory, open file handles and threads are looked at 200 times; they must not grow.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.subjects import Subjects

LOADS, SAMPLES = 300, 200
BACKENDS = ("onnxruntime-cpu", "openvino")
# The part of a run that warms it up: caches fill, and the allocator takes its arenas.
WARM_UP = 0.1
# MiB that memory may grow by from the end of the warm-up to the end, by the fitted line, and still be called flat.
FLAT = 4.0


def measure_long(subjects: Subjects, count: int) -> dict[str, Any]:
    """``count`` frames by `run` and by `Stream`, and 300 loads; each backend in a process of its own."""
    runs: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for backend in BACKENDS:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_measure, args=(str(subjects.bundle), backend, count, sender))
        child.start()
        sender.close()
        try:
            runs[backend] = receiver.recv()
        except EOFError:
            child.join()
            runs[backend] = {"crash": child.exitcode}
        child.join()
    outcomes = [usage["flat"] for run in runs.values() for usage in run.values()]
    return {"frames": count, "loads": LOADS, "flat": all(outcomes), "runs": runs}


def _measure(bundle: str, backend: str, count: int, sender: Connection) -> None:
    from phreg_deploy.runtime import FeatureExtractor
    from phreg_deploy.stream import Stream

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (16, 1, 64, 64, 3), dtype=np.uint8)

    def load() -> FeatureExtractor:
        return FeatureExtractor.load(bundle, backend, threads=1)

    def run() -> Iterator[object]:
        with load() as extractor:
            for i in range(count):
                yield extractor.run(frames[i % 16])

    def stream() -> Iterator[object]:
        source = (frames[i % 16][0] for i in range(count))
        with load() as extractor, Stream(extractor, source, every_frame=True) as opened:
            yield from opened

    def loads() -> Iterator[object]:
        for i in range(LOADS):
            with load() as extractor:
                yield extractor.run(frames[i % 16])

    kinds: dict[str, tuple[Callable[[], Iterator[object]], int]] = {
        "run": (run, count),
        "stream": (stream, count),
        "loads": (loads, LOADS),
    }
    sender.send({kind: watched(steps(), total) for kind, (steps, total) in kinds.items()})


def watched(steps: Iterator[object], total: int) -> dict[str, Any]:
    """Take every step, and return what memory, handles and threads were.

    ``memory``: resident MiB after the warm-up (``first``), at the end (``last``), the largest, and the slope of the
    fitted line in MiB per 1000 steps. ``handles`` and ``threads``: after the warm-up, and at the end. ``flat``: memory
    grew by at most ``FLAT`` by the fitted line, and the other two by none.
    """
    started, seen = time.monotonic(), []
    every = max(1, total // SAMPLES)
    for i in itertools.count():
        if next(steps, None) is None:
            break
        if i % every == 0:
            seen.append((i, *_usage()))
    warm = np.array([row for row in seen if row[0] >= WARM_UP * total], float)
    slope = float(np.polyfit(warm[:, 0], warm[:, 1], 1)[0])
    first, last = warm[0], warm[-1]
    grown = slope * (last[0] - first[0])
    memory = {"first": first[1], "last": last[1], "largest": warm[:, 1].max(), "slope": 1000 * slope}
    handles, threads = ([int(first[at]), int(last[at])] for at in (2, 3))
    return {
        "steps": i,
        "seconds": round(time.monotonic() - started, 1),
        "memory": {key: round(float(value), 3) for key, value in memory.items()},
        "handles": handles,
        "threads": threads,
        "flat": bool(grown <= FLAT and handles[1] <= handles[0] and threads[1] <= threads[0] and i == total),
    }


def _usage() -> tuple[float, int, int]:
    """Resident MiB, open file handles, and threads of this process, Python's and others'."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tasks = Path("/proc/self/task")
    count = len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()
    # The listing itself holds one handle open.
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")) - 1, count
