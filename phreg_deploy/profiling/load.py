"""Measure a bundle under load: threads that call at once, and frames that come at a rate."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from phreg_deploy.profiling.device.telemetry import Telemetry
from phreg_deploy.profiling.report import Entry
from phreg_deploy.profiling.timing import LEAST, describe
from phreg_deploy.progress import Progress

# Calls of each context before measuring: plain, recorded as a CUDA graph, replayed.
WARM = 3


class _Streams:
    """Threads that call back to back for ``seconds``, all from the same moment on.

    They warm up together: contexts take turns, so each of ``contexts`` serves at least ``WARM`` calls before.
    """

    def __init__(
        self, call: Callable[[], object], count: int, seconds: float, telemetry: Telemetry | None, contexts: int
    ) -> None:
        self.call, self.seconds, self.telemetry = call, seconds, telemetry
        self.start, self.warm = 0.0, WARM * math.ceil(max(contexts, count) / count)
        # Start and end of each call, by thread.
        self.times: list[list[tuple[float, float]]] = [[] for _ in range(count)]
        self._errors: list[BaseException] = []
        self._together = threading.Barrier(count)
        self._ready = threading.Barrier(count, self._begin)
        self._threads = [threading.Thread(target=self._work, args=(times,), name="stream") for times in self.times]

    def run(self) -> None:
        """Run all threads to their end, then raise the first error of any."""
        try:
            for thread in self._threads:
                thread.start()
            for thread in self._threads:
                thread.join()
        except BaseException as error:
            # After Ctrl-C no thread may still be at work when the device is freed.
            self._fail(error)
            for thread in filter(threading.Thread.is_alive, self._threads):
                thread.join()
        finally:
            if self.telemetry is not None:
                self.telemetry.stop()
        if self._errors:
            raise self._errors[0]

    def _begin(self) -> None:
        """Start the clock; one thread calls this while the others wait."""
        if self.telemetry is not None:
            self.telemetry.start()
        self.start = time.perf_counter()

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._together.abort()
        self._ready.abort()

    def _work(self, times: list[tuple[float, float]]) -> None:
        try:
            for _ in range(self.warm):
                self._together.wait()
                self.call()
            self._ready.wait()
            now = self.start
            while (now - self.start < self.seconds or len(times) < LEAST) and not self._errors:
                before = time.perf_counter()
                self.call()
                now = time.perf_counter()
                times.append((before, now))
        except threading.BrokenBarrierError:
            # Another thread failed, and has stored its error.
            return
        except BaseException as error:
            self._fail(error)


def sweep(
    call: Callable[[], object],
    streams: int,
    seconds: float,
    progress: Progress,
    batch: int = 1,
    telemetry: Telemetry | None = None,
    contexts: int = 1,
) -> Entry:
    """Measure throughput with ``streams`` threads that call at once, back to back, after all have warmed up.

    ``images_per_second`` and ``latency`` (milliseconds, as a thread sees it) are of the ``calls`` that ended while all
    threads ran; ``telemetry`` is of all calls. ``contexts``: that the backend holds, all of which are warmed up. Raises
    the first error of any thread, once all have ended.
    """
    threads = _Streams(call, streams, seconds, telemetry, contexts)
    with progress.task(f"{streams} streams", None):
        threads.run()
    # Calls after the first thread's end would make many streams look better or worse than they are.
    span = min(times[-1][1] for times in threads.times) - threads.start
    inside = [(start, end) for times in threads.times for start, end in times if end <= threads.start + span]
    images = batch * sum(len(times) for times in threads.times)
    return {
        "streams": streams,
        "calls": len(inside),
        "seconds": span,
        "images_per_second": batch * len(inside) / span,
        "latency": describe(1e3 * (end - start) for start, end in inside),
        "telemetry": telemetry.summary(images) if telemetry is not None else None,
    }


def pace(call: Callable[[], object], fps: float, seconds: float, clock: Any = time) -> Entry:
    """Measure frames that come at ``fps``, as from a camera; none is dropped, and a late one delays the next.

    In milliseconds: ``response`` from the time a frame is due to its features, ``wait`` until its inference starts, and
    ``jitter``, the standard deviation of the response. ``misses``: share of responses longer than a period.
    ``kept_up``: all frames were served in about ``seconds``.
    """
    period, frames = 1 / fps, max(LEAST, int(fps * seconds))
    responses, waits = [], []
    start = clock.perf_counter()
    for index in range(frames):
        due = start + index * period
        if (ahead := due - clock.perf_counter()) > 0:
            clock.sleep(ahead)
        began = clock.perf_counter()
        if began - start > seconds + LEAST * period and index >= LEAST:
            break
        call()
        responses.append(1e3 * (clock.perf_counter() - due))
        waits.append(1e3 * (began - due))
    late = sum(response > 1e3 * period for response in responses)
    return {
        "fps": fps,
        "frames": len(responses),
        "expected": frames,
        "kept_up": len(responses) == frames,
        "misses": late / len(responses),
        "response": describe(responses),
        "wait": {"mean": float(np.mean(waits)), "max": max(waits)},
        "jitter": float(np.std(responses)),
    }


def mark_pareto(entries: list[Entry]) -> None:
    """Set ``pareto`` on each: no other has both more images per second and a shorter median latency."""
    sides = [(entry["images_per_second"], -entry["latency"]["p50"]) for entry in entries]
    for entry, (rate, quick) in zip(entries, sides):
        entry["pareto"] = not any(r >= rate and q >= quick and (r, q) != (rate, quick) for r, q in sides)
