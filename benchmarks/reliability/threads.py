"""Call one extractor from 8 threads, and close it while they call."""

from __future__ import annotations

import ast
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.reliability.subjects import Subjects
from benchmarks.reliability.watching import judge_all
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import photograph

THREADS, FRAMES = 8, 16
# backend and mode of ``FeatureExtractor.load``.
BACKENDS = (("onnxruntime-cpu", "latency"), ("openvino", "latency"), ("openvino", "throughput"))
CLOSINGS = 300
CLOSED = "was closed"
Call = Callable[[FeatureExtractor, int], np.ndarray]


def measure_threads(subjects: Subjects, count: int) -> dict[str, Any]:
    """``count`` calls by 8 threads on one extractor, and 300 extractors closed under 8 threads, for each backend.

    Outcomes of calls: "same" (every bit as of one thread), "other". Of closings: "right" (each call gave the same bits,
    or the error that says that it was closed), "error" (another error), "other" (other bits), "crash", "hang".
    """
    calls: dict[str, dict[str, int]] = {}
    closings: dict[str, dict[str, int]] = {}
    ended: Counter[str] = Counter()
    bad = []
    pictures = [photograph(i, 90 + i, 70) for i in range(FRAMES)]
    for backend, mode in BACKENDS:
        name = f"{backend}, {mode}"

        def load(backend: str = backend, mode: str = mode) -> FeatureExtractor:
            return FeatureExtractor.load(subjects.bundle, backend, mode=mode, threads=2)

        def together(_seed: int) -> tuple[str, str]:
            with load() as extractor:
                expected = [features(extractor, picture) for picture in pictures]
                counts = _call(extractor, pictures, expected, count // THREADS)
            return str(dict(counts)), ""

        def closed(seed: int) -> tuple[str, str]:
            with load() as extractor:
                expected = [features(extractor, picture) for picture in pictures]
                counts = _close(extractor, pictures, expected, random.Random(seed))
            return str(dict(counts)), ""

        (judged,) = judge_all(together, [0], seconds=900)
        calls[name] = _counted(judged.outcome)
        closings[name] = dict.fromkeys(("right", "error", "other", "crash", "hang"), 0)
        for one in judge_all(closed, range(CLOSINGS)):
            counts = _counted(one.outcome)
            ended.update({key: counts[key] for key in ("same", "closed") if key in counts})
            verdict = _verdict(counts)
            closings[name][verdict] = closings[name].get(verdict, 0) + 1
            if verdict != "right":
                bad.append({"backend": name, "seed": one.seed, "what": one.outcome[:300], "change": one.change[-300:]})
    return {
        "threads": THREADS,
        "calls": calls,
        "closings": closings,
        "calls while closing": dict(ended),
        "to look at": bad,
    }


def features(extractor: FeatureExtractor, picture: Any) -> np.ndarray:
    """The features of a picture, by a whole call: resized, run, and masked."""
    return extractor(picture).features


def _call(extractor: FeatureExtractor, pictures: list[Any], expected: list[np.ndarray], each: int) -> Counter[str]:
    """Call the extractor from all threads at once, each in its own order."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        own: Counter[str] = Counter()
        for i in range(each):
            at = (i * (2 * number + 1) + number) % FRAMES
            got = features(extractor, pictures[at])
            own["same" if np.array_equal(got, expected[at]) else "other"] += 1
        with lock:
            counts.update(own)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    _run_all(threads)
    counts["missing"] = each * THREADS - counts["same"] - counts["other"]
    return counts


def _close(
    extractor: FeatureExtractor, pictures: list[Any], expected: list[np.ndarray], draw: random.Random
) -> Counter[str]:
    """Close the extractor at a random moment; every thread calls until it is told that it was closed."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        for i in range(100_000):
            at = (i + number) % FRAMES
            try:
                got = features(extractor, pictures[at])
                said = "same" if np.array_equal(got, expected[at]) else "other"
            except PhregError as error:
                said = "closed" if CLOSED in str(error) else f"error: {error}"
            except Exception as error:
                said = f"error: {type(error).__name__}: {error}"
            with lock:
                counts[said] += 1
            if said != "same":
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    # Threads change often, so that the extractor is closed at any line of a call.
    sys.setswitchinterval(draw.choice([1e-6, 1e-5, 1e-4]))
    for thread in threads:
        thread.start()
    time.sleep(draw.random() * 0.05)
    extractor.close()
    for thread in threads:
        thread.join()
    return counts


def _run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _counted(outcome: str) -> dict[str, Any]:
    """The counts that a child sent as text; "crash", "hang" and the like count one."""
    return ast.literal_eval(outcome) if outcome.startswith("{") else {outcome: 1}


def _verdict(counts: dict[str, Any]) -> str:
    if any(key.startswith("error") for key in counts):
        return "error"
    for word in ("other", "crash", "hang", "memory", "traceback"):
        if counts.get(word):
            return word
    return "right" if counts.get("closed") == THREADS else "other"
