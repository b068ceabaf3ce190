"""Alarms of a stream: each is raised once when its condition begins, and again only after it has ended."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from phreg_deploy.spec import Stored

# Alarms that are kept.
KEPT = 100
KINDS = ("late", "artifacts", "ended", "failed", "stalled", "slow", "unreadable", "fallback")

logger = logging.getLogger("phreg_deploy.stream")


@dataclass(frozen=True)
class Alarm(Stored):
    """``kind``: of ``KINDS``. ``camera``: its name, or "" for the whole stream. ``clock``: seconds of ``time.time``."""

    kind: str
    camera: str
    message: str
    clock: float

    def __str__(self) -> str:
        return f"{self.camera}: {self.message}" if self.camera else self.message


class Alarms:
    """Raises alarms by a callback, or as warnings of the logger ``phreg_deploy.stream`` without one.

    ``kept``: the last ``KEPT`` alarms. ``counts``: how many there were, by kind. Several threads may call it.
    """

    def __init__(self, callback: Callable[[Alarm], None] | None) -> None:
        self._callback, self._lock = callback, threading.Lock()
        self._active: set[tuple[str, str]] = set()
        self.kept: deque[Alarm] = deque(maxlen=KEPT)
        self.counts: Counter[str] = Counter()

    def judge(self, kind: str, camera: str, exceeded: bool, message: str) -> None:
        """Raise the alarm if its condition has just begun; forget it once the condition has ended."""
        with self._lock:
            begun = exceeded and (kind, camera) not in self._active
            (self._active.add if exceeded else self._active.discard)((kind, camera))
        if begun:
            self.raise_now(kind, camera, message)

    def raise_now(self, kind: str, camera: str, message: str) -> None:
        """Raise an alarm that has no duration."""
        alarm = Alarm(kind, camera, message, time.time())
        with self._lock:
            self.kept.append(alarm)
            self.counts[kind] += 1
        if self._callback is None:
            logger.warning("%s", alarm)
        else:
            self._callback(alarm)
