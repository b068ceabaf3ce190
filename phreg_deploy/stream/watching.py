"""``watch``: run a stream until it ends, show it, and report its figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.arguments import check_file
from phreg_deploy.errors import FORCE, PhregError
from phreg_deploy.extras import require
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.spec import Stored
from phreg_deploy.stream.alarms import Alarm
from phreg_deploy.stream.frames import CameraFigures
from phreg_deploy.stream.stream import Stream

# Frames per second of a written video whose source names no rate.
RATE = 25.0


@dataclass(frozen=True)
class WatchReport(Stored):
    """What a stream did. ``seconds``: from its start to its end. ``alarms``: the last of them; ``alarm_counts``: all,
    by kind. ``interrupted``: by Ctrl-C. ``written``: the video, or None."""

    backend: str
    seconds: float
    cameras: list[CameraFigures]
    alarms: list[Alarm]
    alarm_counts: dict[str, int]
    interrupted: bool
    written: str | None


def check_video(path: Path | None, force: bool) -> None:
    """Raise ``PhregError`` unless a video can be written to ``path``; ``force`` replaces one that exists."""
    if path is None:
        return
    require("--write", video=("cv2",))
    if path.suffix.lower() != ".mp4":
        raise PhregError(f"write: got {path.name}, expected a name that ends in .mp4.")
    if path.exists() and not force:
        raise PhregError(f"write: {path} exists already; add {FORCE} to replace it, or choose another name.")
    check_file(path, "write")


def watch(
    extractor: FeatureExtractor,
    source: Any,
    *,
    frames: int | None = None,
    write: Path | None = None,
    force: bool = False,
    show: Callable[[Stream], None] = lambda _stream: None,
    **options: Any,
) -> WatchReport:
    """Serve a stream until its sources end, ``frames`` were served, or Ctrl-C.

    Args:
        source, options: of ``Stream``.
        write: an MP4 to write, see ``OverlayWriter``; ``force`` replaces one that exists.
        show: is called after each result.

    Raises:
        PhregError: see ``Stream`` and ``check_video``; a backend that failed without a fall-back.
    """
    check_video(write, force)
    served, interrupted = 0, False
    with ExitStack() as stack:
        stream = stack.enter_context(Stream(extractor, source, **options))
        started = time.monotonic()
        writer = None
        if write is not None:
            from phreg_deploy.stream.overlay import OverlayWriter

            rates = [camera.source.fps for camera in stream.cameras.values()]
            writer = OverlayWriter(write, rates[0] or RATE, extractor.manifest.heads)
            stack.callback(writer.close)
        try:
            for result in stream:
                served += 1
                if writer is not None:
                    writer.write(result)
                show(stream)
                if served == frames:
                    break
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.monotonic() - started
        stream.stop()
        cameras = list(stream.figures().values())
    written = str(write) if write is not None and served else None
    alarms = list(stream.alarms.kept), dict(stream.alarms.counts)
    return WatchReport(stream.backend, seconds, cameras, *alarms, interrupted, written)
