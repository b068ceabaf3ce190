"""``Camera``: one source's slot, in which the newest frame wins, and its counts."""

from __future__ import annotations

import threading
from collections import Counter, deque

import numpy as np

from phreg_deploy.stream.alarms import Alarms
from phreg_deploy.stream.frames import CameraFigures, Frame, StreamResult
from phreg_deploy.stream.limits import Limits
from phreg_deploy.stream.sources.source import Source


class Camera:
    """The slot and the counts of one source. All methods take the stream's condition, which they notify."""

    def __init__(self, name: str, source: Source, condition: threading.Condition, limits: Limits) -> None:
        self.name, self.source, self._changed, self._limits = name, source, condition, limits
        self.slot: Frame | None = None
        self.ended = False
        # Seconds of ``time.monotonic``: the start, then the last capture.
        self.heard = 0.0
        self._received = self._served = self._late = self._running = self._waiting = 0
        self._dropped: Counter[str] = Counter()
        # Of the last results: done, latency in seconds, artifact rate, late.
        self._recent: deque[tuple[float, float, float, bool]] = deque(maxlen=limits.window)

    def offer(self, frame: Frame, wait: bool, stopping: threading.Event) -> bool:
        """Put a frame into the slot; return whether the stream goes on.

        Args:
            wait: wait until the slot is free, in place of dropping the frame that is in it.
        """
        with self._changed:
            self.heard = frame.captured
            self._received += 1
            self._waiting = 1
            while wait and self.slot is not None and not stopping.is_set():
                self._changed.wait()
            self._waiting = 0
            if stopping.is_set():
                self._dropped["stopped"] += 1
                return False
            if self.slot is not None:
                self._dropped["newer"] += 1
            self.slot = frame
            self._changed.notify_all()
            return True

    def take(self) -> Frame:
        """Take the frame out of the slot, to run it. The caller holds the condition and has looked."""
        frame, self.slot = self.slot, None
        assert frame is not None
        self._running += 1
        self._changed.notify_all()
        return frame

    def serve(self, result: StreamResult) -> None:
        """Count a frame that was taken as served."""
        with self._changed:
            self._running -= 1
            self._served += 1
            self._late += result.late
            self._recent.append((result.done, result.latency, float(result.dense.artifact_rate[0]), result.late))

    def drop(self, reason: str) -> None:
        """Count a frame that was taken as dropped."""
        with self._changed:
            self._running -= 1
            self._dropped[reason] += 1

    def end(self) -> None:
        """Note that the source gives no more frames."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Drop the frame that still waits, as the stream has stopped."""
        with self._changed:
            if self.slot is not None:
                self.slot = None
                self._dropped["stopped"] += 1

    def figures(self) -> CameraFigures:
        """The figures at this moment."""
        with self._changed:
            recent, dropped = list(self._recent), dict(self._dropped)
            counts = (self._received, self._served, sum(dropped.values()), dropped)
            pending = self._waiting + (self.slot is not None) + self._running
            late, ended = self._late, self.ended
        if not recent:
            return CameraFigures(self.name, *counts, pending, late, None, None, None, None, None, ended)
        done, latency, rate, missed = (np.array(column, dtype=float) for column in zip(*recent))
        p50, p99 = (1e3 * float(value) for value in np.quantile(latency, (0.5, 0.99)))
        fps = float((len(done) - 1) / (done[-1] - done[0])) if len(done) > 1 and done[-1] > done[0] else None
        figures = (fps, p50, p99, float(missed.mean()), float(rate.mean()))
        return CameraFigures(self.name, *counts, pending, late, *figures, ended)

    def judge(self, alarms: Alarms) -> None:
        """Raise the alarms of the shares and rates of the last results, once there are enough."""
        limits = self._limits
        bounded = limits.deadline is not None or limits.artifact_rate is not None
        if not bounded or len(self._recent) < limits.least:
            return
        figures = self.figures()
        if limits.deadline is not None and figures.late_share is not None:
            text = f"{100 * figures.late_share:.0f} % of frames missed the deadline of {1e3 * limits.deadline:.0f} ms"
            alarms.judge("late", self.name, figures.late_share > limits.late_share, text)
        if limits.artifact_rate is not None and figures.artifact_rate is not None:
            text = f"the artifact rate is {100 * figures.artifact_rate:.2f} %, above {100 * limits.artifact_rate:.2f} %"
            alarms.judge("artifacts", self.name, figures.artifact_rate > limits.artifact_rate, text)
