"""``Capture``: the thread that reads one source and puts its frames into the camera's slot."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from phreg_deploy.errors import PhregError
from phreg_deploy.stream.alarms import Alarms
from phreg_deploy.stream.camera import Camera
from phreg_deploy.stream.frames import Frame


class Capture:
    """Reads a camera's source until it ends or the stream stops, and closes it.

    Args:
        stopping: is set when the stream stops. failed: is called with an error of the source's own code.
        every_frame, fps: as of ``Stream``.

    Raises:
        PhregError: ``every_frame`` or ``fps`` with a camera, or a rate out of bounds.
    """

    def __init__(
        self,
        camera: Camera,
        stopping: threading.Event,
        alarms: Alarms,
        failed: Callable[[BaseException], None],
        every_frame: bool,
        fps: float | None,
    ) -> None:
        source = camera.source
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise PhregError(f"fps: got {fps}, expected frames per second above 0.")
        if source.live and (every_frame or fps is not None):
            option = "every_frame" if every_frame else "fps"
            raise PhregError(
                f"{option}: {camera.name} is a camera, which does not wait; expected a file or an iterator. Leave the "
                "option out: the newest frame is served, and every other one is counted."
            )
        self._camera, self._stopping, self._alarms, self._failed = camera, stopping, alarms, failed
        self._every, self._fps = every_frame, None if every_frame or source.live else fps or source.fps
        self.thread = threading.Thread(target=self._run, name=f"phreg-stream {camera.name}", daemon=True)

    def _run(self) -> None:
        try:
            self._read_and_say()
        except BaseException as error:  # an iterator or a callback may raise anything
            self._failed(error)
        finally:
            # Last, since the stream may end with its last camera.
            self._camera.end()

    def _read_and_say(self) -> None:
        """Read to the end, and raise the alarm of it, unless the stream stops first."""
        camera = self._camera
        try:
            count = self._read_all()
        finally:
            camera.source.close()
        if not self._stopping.is_set():
            kind = "failed" if camera.source.live or not count else "ended"
            what = "the camera gives no more frames" if camera.source.live else "the source ended"
            self._alarms.raise_now(kind, camera.name, f"{what}, after {count} frames")

    def _read_all(self) -> int:
        """Read frames at their times; return how many."""
        started, index = time.monotonic(), 0
        while not self._stopping.is_set():
            image = self._camera.source.read()
            if image is None:
                break
            if self._fps is not None:
                due = started + index / self._fps - time.monotonic()
                if due > 0 and self._stopping.wait(due):
                    break
            frame = Frame(self._camera.name, index, image, self._camera.source.color, time.monotonic(), time.time())
            if not self._camera.offer(frame, self._every, self._stopping):
                break
            index += 1
        return index
