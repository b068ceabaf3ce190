"""What passes through a stream: frames, results, and the figures of a camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.spec import Stored


@dataclass(frozen=True)
class Frame:
    """A frame of a source. ``index``: its number there, from 0. ``captured``: seconds of ``time.monotonic``;
    ``clock``: seconds of ``time.time``. ``image``: as the source gave it; ``color``: its channel order, or None."""

    camera: str
    index: int
    image: Any
    color: str | None
    captured: float
    clock: float


@dataclass(frozen=True)
class StreamResult:
    """The features of a frame.

    ``frame``: as captured. ``image``: as the model read it, uint8 RGB ``(H, W, 3)``. ``dense``: B is 1. ``started``,
    ``done``: seconds of ``time.monotonic`` when its preprocessing began and its features were there. ``late``: the
    deadline was missed. ``backend``: the name of the backend that ran.
    """

    frame: Frame
    image: np.ndarray
    dense: DenseFeatures
    started: float
    done: float
    late: bool
    backend: str

    @property
    def latency(self) -> float:
        """Seconds from capture to features."""
        return self.done - self.frame.captured


@dataclass(frozen=True)
class CameraFigures(Stored):
    """The figures of a camera at one moment; ``received`` = ``served`` + ``dropped`` + ``pending``, always.

    ``dropped_by``: reason -> frames. "newer": replaced by a newer frame before its turn; "unreadable": no image;
    "stopped": the stream ended first. ``late``: served after the deadline. ``fps``, results per second, the
    ``latency`` percentiles in milliseconds from capture to features, ``late_share`` and the mean ``artifact_rate`` are
    over the last results, as many as ``Limits.window``; None before there are any.
    """

    camera: str
    received: int
    served: int
    dropped: int
    dropped_by: dict[str, int]
    pending: int
    late: int
    fps: float | None
    latency_p50: float | None
    latency_p99: float | None
    late_share: float | None
    artifact_rate: float | None
    ended: bool
