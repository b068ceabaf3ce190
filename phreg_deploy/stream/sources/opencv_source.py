"""Video files, cameras and network streams through OpenCV."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.stream.sources.addresses import public_name

# Milliseconds after which a network stream that does not answer is given up.
OPEN_TIMEOUT, READ_TIMEOUT = 10_000, 5_000


@contextmanager
def _silent() -> Iterator[None]:
    """Keep OpenCV from writing on stderr what it tries: the error says what failed."""
    # OpenCV before 4.13 has the functions in cv2 itself, and no name for the level 0, silence.
    levels = getattr(cv2.utils, "logging", cv2)
    before = levels.getLogLevel()
    levels.setLogLevel(0)
    try:
        yield
    finally:
        levels.setLogLevel(before)


class OpenCVSource:
    """Frames as uint8 BGR ``(H, W, 3)``; videos are turned upright by their own rotation.

    Args:
        place: a file, an address, or a camera's number. live: it does not wait for its reader.

    Raises:
        PhregError: it cannot be opened, or is no video.
    """

    color: str | None = "bgr"

    def __init__(self, place: str | int, live: bool) -> None:
        self.live = live
        with _silent():
            if isinstance(place, str) and live:
                timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT]
                self._capture = cv2.VideoCapture(place, cv2.CAP_FFMPEG, timeouts)
            else:
                self._capture = cv2.VideoCapture(place)
        if not self._capture.isOpened():
            self._capture.release()
            name = public_name(str(place))
            kind = "camera" if isinstance(place, int) else "stream" if live else "file"
            hint = "Is it connected, and not used by another program?" if live else "Is it a video, and whole?"
            raise PhregError(f"source: OpenCV cannot open the {kind} {name}. {hint}")
        self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps: float | None = rate if math.isfinite(rate) and rate > 0 else None

    def read(self) -> np.ndarray | None:
        there, frame = self._capture.read()
        return frame if there else None

    def close(self) -> None:
        self._capture.release()
