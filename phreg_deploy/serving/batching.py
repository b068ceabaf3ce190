"""``Batcher``: group images of several requests into batches of one size. Needs no web framework."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.dense_features import DenseFeatures

logger = logging.getLogger("phreg_deploy.serving")


class QueueFull(PhregError):
    """So many images wait already that one more is refused."""


class Stopped(PhregError):
    """The batcher takes no more images."""


@dataclass(frozen=True)
class Served:
    """One image's share of a batch: ``dense`` of that image alone (B = 1), seconds in the queue and in the run, and
    the number of images that ran together."""

    dense: DenseFeatures
    queued: float
    ran: float
    batch: int


@dataclass
class _Waiting:
    image: np.ndarray
    arrived: float
    future: Future[Served] = field(default_factory=Future)


class Batcher:
    """Runs images on one thread, in the order in which they came, several of one size at a time.

    A run begins when the one before has ended and either ``most`` images of the oldest one's size wait, or the oldest
    has waited ``wait`` seconds. An image whose future was cancelled before its run is never run.

    Args:
        run: computes features of uint8 RGB images ``(B, H, W, 3)``, such as ``FeatureExtractor.dense``.
        most: images in one run. wait: seconds. queue: images that may wait beside those that run.
        observe: is called after each run with its size and seconds; None for a run that failed.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], DenseFeatures],
        *,
        most: int,
        wait: float,
        queue: int,
        observe: Callable[[int, float | None], None] = lambda _size, _seconds: None,
    ) -> None:
        self._run, self._most, self._wait, self._queue, self._observe = run, most, wait, queue, observe
        self._waiting: deque[_Waiting] = deque()
        self._running, self._stopped = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="phreg-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait for their run."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Images in the run."""
        return self._running

    def submit(self, image: np.ndarray) -> Future[Served]:
        """Queue an image, uint8 RGB ``(H, W, 3)`` at a size that the bundle serves.

        Raises:
            QueueFull: ``queue`` images wait beside a full batch. Stopped: ``close`` was called.
        """
        entry = _Waiting(image, time.perf_counter())
        with self._changed:
            if self._stopped:
                raise Stopped("serve: the service is stopping and takes no more images; ask another one.")
            # While nothing runs, the next batch is still in the queue.
            room = self._queue + (0 if self._running else self._most)
            if len(self._waiting) >= room:
                self._drop_cancelled()
            if len(self._waiting) >= room:
                raise QueueFull(f"serve: {len(self._waiting)} images wait already; ask again in a second.")
            self._waiting.append(entry)
            self._changed.notify()
        return entry.future

    def close(self) -> None:
        """Refuse new images, finish those that wait, and end the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _drop_cancelled(self) -> None:
        self._waiting = deque(entry for entry in self._waiting if not entry.future.cancelled())

    def _serve(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[_Waiting]:
        """Wait for a batch and take it out of the queue; an empty one means the end."""
        with self._changed:
            self._running = 0
            while True:
                self._drop_cancelled()
                if not self._waiting:
                    if self._stopped:
                        return []
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                alike = [entry for entry in self._waiting if entry.image.shape == first.image.shape][: self._most]
                left = first.arrived + self._wait - time.perf_counter()
                if len(alike) < self._most and left > 0 and not self._stopped:
                    self._changed.wait(left)
                    continue
                batch = [entry for entry in alike if entry.future.set_running_or_notify_cancel()]
                taken = set(map(id, alike))
                self._waiting = deque(entry for entry in self._waiting if id(entry) not in taken)
                if batch:
                    self._running = len(batch)
                    return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        try:
            dense = self._run(np.stack([entry.image for entry in batch]))
            ran = time.perf_counter() - started
            parts = [Served(dense.single(i), started - e.arrived, ran, len(batch)) for i, e in enumerate(batch)]
        # Every request of the batch must be answered, whatever the backend raised.
        except BaseException as error:
            logger.exception("A run of %d images failed.", len(batch))
            self._report(len(batch), None)
            for entry in batch:
                entry.future.set_exception(error)
            return
        self._report(len(batch), ran)
        for entry, part in zip(batch, parts):
            entry.future.set_result(part)

    def _report(self, size: int, seconds: float | None) -> None:
        try:
            self._observe(size, seconds)
        except Exception:
            logger.exception("Observing a run failed.")
