"""``Stream``: cameras, videos and iterators through one extractor, with every drop counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.images.fitting import check_fit
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.stream.alarms import Alarm, Alarms
from phreg_deploy.stream.camera import Camera
from phreg_deploy.stream.capture import Capture
from phreg_deploy.stream.engine import Engine, Fallback
from phreg_deploy.stream.frames import CameraFigures, Frame, StreamResult
from phreg_deploy.stream.limits import Limits
from phreg_deploy.stream.sources.opening import open_source
from phreg_deploy.stream.watchdog import Watchdog

# Seconds that ``stop`` waits for the threads.
PATIENCE = 30.0


class Stream(AbstractContextManager["Stream"]):
    """Runs the frames of one or several sources, newest first, and hands out results and alarms.

    Each source has a thread and a slot for one frame: a newer frame replaces one that still waits, which is counted as
    dropped. One worker runs the frames, and takes the cameras in turn. ``with Stream(...) as stream`` starts it; the
    end of the block, or ``stop``, ends all its threads. Take results by iterating, or by ``on_result``.

    Args:
        extractor: stays the caller's, who closes it.
        source: what ``open_source`` takes; several as a mapping from names to them.
        every_frame: serve every frame of files and iterators, which then wait; no frame is dropped.
        fps: pace files and iterators at this rate; None takes a video's own rate, and an iterator's as it comes. With
            ``every_frame`` nothing is paced.
        size, fit: as in a call of the extractor.
        limits: bounds that raise alarms.
        on_result, on_alarm: are called in the stream's threads. An error of theirs ends the stream, and ``stop`` raises
            it. Without ``on_alarm``, alarms are warnings of the logger ``phreg_deploy.stream``.
        fallback: what takes over when the backend fails, see ``Engine``; it raises an alarm. Without one, the failure
            ends the stream.

    Raises:
        PhregError: a source that cannot be opened, or an option out of bounds.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        source: Any,
        *,
        every_frame: bool = False,
        fps: float | None = None,
        size: tuple[int, int] | None = None,
        fit: str | None = None,
        limits: Limits | None = None,
        on_result: Callable[[StreamResult], None] | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
        fallback: Fallback | None = None,
    ) -> None:
        check_fit(fit)
        if size is not None:
            extractor.manifest.sizes.check(size, extractor.spec.patch)
        self.limits, self.alarms, self._on_result = limits or Limits(), Alarms(on_alarm), on_result
        self._engine = Engine(extractor, fallback, size, fit, lambda text: self.alarms.raise_now("fallback", "", text))
        self._changed = threading.Condition()
        # Set when the stream is to end; when its worker has ended.
        self._stopping, self._over = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._result: StreamResult | None = None
        # Seconds of ``time.monotonic`` when the present run began.
        self._running_since: float | None = None
        self._turn = 0
        self.cameras: dict[str, Camera] = {}
        self._captures: list[Capture] = []
        try:
            for name, one in _named(source).items():
                camera = Camera(name, open_source(one), self._changed, self.limits)
                self.cameras[name] = camera
                self._captures.append(Capture(camera, self._stopping, self.alarms, self._fail, every_frame, fps))
        except BaseException:
            self._close_sources()
            raise
        watchdog = Watchdog(self.limits, self.alarms, list(self.cameras.values()), lambda: self._running_since)
        work = threading.Thread(target=self._work, name="phreg-stream worker", daemon=True)
        watch = threading.Thread(
            target=self._guard, args=(lambda: watchdog.run(self._over),), name="phreg-stream watchdog", daemon=True
        )
        self._threads = [*(capture.thread for capture in self._captures), work, watch]

    def __enter__(self) -> Stream:
        self.start()
        return self

    def start(self) -> None:
        """Start the threads; ``with`` does it. Raises ``PhregError`` the second time."""
        if any(thread.ident is not None for thread in self._threads):
            raise PhregError("stream: it was started already; make another one, since its sources were read.")
        now = time.monotonic()
        for camera in self.cameras.values():
            camera.heard = now
        for thread in self._threads:
            thread.start()

    def __exit__(self, kind: Any, *_error: object) -> None:
        self.stop(quietly=kind is not None)

    def __iter__(self) -> Iterator[StreamResult]:
        """Results in their order, until the sources end or the stream is stopped; raises what ended it."""
        if self._on_result is not None:
            raise PhregError("stream: results go to on_result; leave it out to iterate.")
        while True:
            with self._changed:
                while self._result is None and not self._over.is_set():
                    self._changed.wait()
                result, self._result = self._result, None
                if result is None:
                    break
                self.cameras[result.frame.camera].serve(result)
                self._changed.notify_all()
            self.cameras[result.frame.camera].judge(self.alarms)
            yield result
        self._raise()

    @property
    def backend(self) -> str:
        """The name of the backend that runs now."""
        return self._engine.backend

    def figures(self) -> dict[str, CameraFigures]:
        """The figures of each camera at this moment."""
        return {name: camera.figures() for name, camera in self.cameras.items()}

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every source has ended and its frames are served, or the stream is stopped; for ``on_result``.

        Returns:
            Whether it has ended, False after ``timeout`` seconds.
        """
        if self._on_result is None:
            raise PhregError("stream: nobody takes the results; iterate, or give on_result before you wait.")
        return self._over.wait(timeout)

    def stop(self, timeout: float = PATIENCE, quietly: bool = False) -> None:
        """End the stream and wait for its threads; from a callback, only ask for the end.

        Args:
            timeout: seconds to wait. quietly: do not raise what had ended the stream.

        Raises:
            PhregError: a thread hangs in a source or a backend. Any error that had ended the stream.
        """
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if threading.current_thread() in self._threads:
            return
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        hanging = [thread.name for thread in self._threads if thread.is_alive()]
        if hanging and not quietly:
            raise PhregError(f"stream: {', '.join(hanging)} did not end within {timeout:.0f} s.") from self._error
        if not hanging:
            self._settle()
        if not quietly:
            self._raise()

    def _settle(self) -> None:
        """Count what was left when the threads ended, and free everything."""
        with self._changed:
            if self._result is not None:
                self.cameras[self._result.frame.camera].drop("stopped")
                self._result = None
        for camera in self.cameras.values():
            camera.clear()
        self._close_sources()
        self._engine.close()

    def _close_sources(self) -> None:
        """Close the sources whose threads never ran; each thread closes its own."""
        for camera in self.cameras.values():
            if not camera.ended:
                camera.source.close()
                camera.ended = True

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _fail(self, error: BaseException) -> None:
        """End the stream because of an error, which ``stop`` and the iterator raise."""
        self._error = self._error or error
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # a callback may raise anything
            self._fail(error)

    def _work(self) -> None:
        self._guard(self._serve_all)
        with self._changed:
            self._over.set()
            self._changed.notify_all()

    def _serve_all(self) -> None:
        while (frame := self._next()) is not None:
            self._serve(frame)

    def _next(self) -> Frame | None:
        """Wait for a frame; the camera after the last one's comes first. None at the end."""
        cameras = list(self.cameras.values())
        with self._changed:
            while not self._stopping.is_set():
                for step in range(len(cameras)):
                    camera = cameras[(self._turn + step) % len(cameras)]
                    if camera.slot is not None:
                        self._turn = (self._turn + step + 1) % len(cameras)
                        return camera.take()
                if all(camera.ended for camera in cameras):
                    return None
                self._changed.wait()
        return None

    def _serve(self, frame: Frame) -> None:
        camera = self.cameras[frame.camera]
        self._running_since = started = time.monotonic()
        try:
            fitted = self._engine.fitted(frame)
        except PhregError as error:
            self._running_since = None
            camera.drop("unreadable")
            self.alarms.judge("unreadable", camera.name, True, f"frame {frame.index} cannot be read: {error}")
            return
        self.alarms.judge("unreadable", camera.name, False, "")
        try:
            dense = self._engine.run(fitted)
        except BaseException:
            camera.drop("failed")
            raise
        finally:
            self._running_since = None
        done = time.monotonic()
        late = self.limits.deadline is not None and done - frame.captured > self.limits.deadline
        self._deliver(StreamResult(frame, fitted.image, dense, started, done, late, self.backend), camera)

    def _deliver(self, result: StreamResult, camera: Camera) -> None:
        if self._on_result is not None:
            camera.serve(result)
            camera.judge(self.alarms)
            self._on_result(result)
            return
        with self._changed:
            while self._result is not None and not self._stopping.is_set():
                self._changed.wait()
            if self._stopping.is_set():
                camera.drop("stopped")
                return
            self._result = result
            self._changed.notify_all()


def _named(source: Any) -> dict[str, Any]:
    """The sources by name: a mapping's own names, or the source's path or kind."""
    if not isinstance(source, Mapping):
        return {"camera": source}
    if not source:
        raise PhregError("source: got no camera, expected at least one.")
    return {str(name): one for name, one in source.items()}
