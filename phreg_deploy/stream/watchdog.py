"""``Watchdog``: raises alarms for what does not happen: no frame, or no end of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from phreg_deploy.stream.alarms import Alarms
from phreg_deploy.stream.camera import Camera
from phreg_deploy.stream.limits import Limits

# Looks per bound, and the longest time between two, in seconds.
LOOKS, LONGEST = 5, 0.5


class Watchdog:
    """Looks at cameras and at the present run.

    Args:
        running_since: gives seconds of ``time.monotonic`` when the present run began, or None between runs.
    """

    def __init__(
        self, limits: Limits, alarms: Alarms, cameras: list[Camera], running_since: Callable[[], float | None]
    ) -> None:
        self._limits, self._alarms, self._cameras, self._running_since = limits, alarms, cameras, running_since

    def run(self, over: threading.Event) -> None:
        """Look until ``over`` is set."""
        while not over.wait(min(self._limits.no_frame / LOOKS, self._limits.slow_run / LOOKS, LONGEST)):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Raise the alarms that are due at ``now``, seconds of ``time.monotonic``."""
        for camera in self._cameras:
            # A source that waits for its turn is not silent.
            silent = 0.0 if camera.ended or camera.slot is not None else now - camera.heard
            text = f"no frame for {silent:.1f} s"
            self._alarms.judge("stalled", camera.name, silent > self._limits.no_frame, text)
        since = self._running_since()
        taken = 0.0 if since is None else now - since
        self._alarms.judge("slow", "", taken > self._limits.slow_run, f"a run has taken {taken:.1f} s and goes on")
