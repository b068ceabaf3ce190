"""Open video files, cameras, network streams, folders of photographs and iterators as sources."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.extras import is_importable, require
from phreg_deploy.images.photographs import list_images
from phreg_deploy.stream.sources.addresses import NETWORK
from phreg_deploy.stream.sources.source import Source

EXPECTED = "a video file, a folder of images, a camera's number, an rtsp:// address, or an iterable of images"


class IterableSource:
    """Frames of an iterable: arrays, PIL images or paths."""

    live: bool = False
    color: str | None = None

    def __init__(self, frames: Iterable[Any], fps: float | None = None) -> None:
        self.fps = fps
        self._frames: Iterator[Any] = iter(frames)

    def read(self) -> Any:
        return next(self._frames, None)

    def close(self) -> None:
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()


def open_source(source: Any) -> Source:
    """Open a source.

    Args:
        source: a path of a video or of a folder of images, a camera's number, an address such as ``rtsp://...``, an
            iterable of images, or a ``Source``, which is returned as it is.

    Raises:
        PhregError: it does not exist or cannot be opened. BackendMissing: neither OpenCV nor PyAV is installed.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if NETWORK.match(text):
            return _video(text, live=True)
        if text.isdigit():
            return _video(int(text), live=True)
        return _from_path(Path(text))
    if isinstance(source, (int, np.integer)) and not isinstance(source, bool) and source >= 0:
        return _video(int(source), live=True)
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise PhregError(f"source: got an array of {source.dtype} {source.shape}, expected frames (N, H, W, 3).")
    if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray, dict)):
        return IterableSource(source)
    raise PhregError(f"source: got {type(source).__name__}, expected {EXPECTED}.")


def _from_path(path: Path) -> Source:
    if path.is_dir():
        return IterableSource(list_images(path))
    if not path.exists():
        raise PhregError(f"source: there is no file {path}; expected {EXPECTED}.")
    return _video(str(path), live=False)


def _video(place: str | int, live: bool) -> Source:
    if is_importable("cv2") or not is_importable("av"):
        require("a video or camera", video=("cv2",))
        from phreg_deploy.stream.sources.opencv_source import OpenCVSource

        return OpenCVSource(place, live)
    if isinstance(place, int):
        require("a camera", video=("cv2",))
    from phreg_deploy.stream.sources.pyav_source import PyAVSource

    return PyAVSource(str(place), live)
