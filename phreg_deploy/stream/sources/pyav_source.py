"""Video files and network streams through PyAV, where OpenCV is not installed."""

from __future__ import annotations

from typing import Any

import av
import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.stream.sources.addresses import public_name

# Seconds after which a network stream that does not answer is given up: (open, read).
TIMEOUTS = (10.0, 5.0)


class PyAVSource:
    """Frames as uint8 RGB ``(H, W, 3)``; videos are turned upright by their own rotation.

    Args:
        place: a file or an address. live: it does not wait for its reader.

    Raises:
        PhregError: it cannot be opened, or holds no video.
    """

    color: str | None = "rgb"

    def __init__(self, place: str, live: bool) -> None:
        self.live = live
        try:
            self._container: Any = av.open(place, timeout=TIMEOUTS if live else None)
        except (av.FFmpegError, OSError) as error:
            raise PhregError(
                f"source: PyAV cannot open {public_name(place)} ({error.strerror}). Is it a video, and whole?"
            ) from None
        if not self._container.streams.video:
            self._container.close()
            raise PhregError(f"source: {public_name(place)} holds no video; expected a video file or stream.")
        video = self._container.streams.video[0]
        video.thread_type = "AUTO"
        self.fps: float | None = float(video.average_rate) if video.average_rate else None
        self._frames = self._container.decode(video)

    def read(self) -> np.ndarray | None:
        try:
            frame = next(self._frames, None)
        except (av.FFmpegError, OSError):
            return None
        if frame is None:
            return None
        turns = round(getattr(frame, "rotation", 0) / 90)
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))

    def close(self) -> None:
        self._container.close()
