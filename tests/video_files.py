"""Small videos for tests of streams, and sources whose frames come when a test says so."""

import threading
from pathlib import Path

import numpy as np
import pytest

from tests.cli_helpers import photograph

SIZE = (48, 64)


def video_frames(count: int) -> list[np.ndarray]:
    """Different frames, uint8 RGB ``(48, 64, 3)``."""
    return [np.asarray(photograph(seed, SIZE[1], SIZE[0])) for seed in range(count)]


def write_video(path: Path, frames: list[np.ndarray], fps: float = 30.0) -> Path:
    """Write RGB frames with Motion JPEG, which keeps each of them apart."""
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, SIZE[::-1])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


class HeldSource:
    """A source that gives one frame and then waits until ``release`` is set, as a camera that hangs."""

    live, fps, color = True, None, None

    def __init__(self) -> None:
        self.release, self.closed, self._given = threading.Event(), False, False

    def read(self) -> np.ndarray | None:
        if self._given:
            self.release.wait(5)
            return None
        self._given = True
        return video_frames(1)[0]

    def close(self) -> None:
        self.closed = True
