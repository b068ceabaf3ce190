"""Write a video of what the model reads, token norms over it as heat, features as colours, and heads' answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.errors import PhregError
from phreg_deploy.images.overlays import draw_answer
from phreg_deploy.images.pictures import colours, components, heat
from phreg_deploy.layers import FEATURES
from phreg_deploy.stream.frames import StreamResult

# Height of the video in pixels, and the share of the heat over the image.
HEIGHT, SHARE = 360, 0.5


class OverlayWriter:
    """Writes an MP4 of three panels and one for each head, frame by frame; of two where only heads are served.

    The colours are the principal components of the first frame. Norms are as bright as can be from three times the
    base model's median, or the first frame's.

    Raises:
        PhregError: OpenCV cannot write the file.
    """

    def __init__(self, path: Path, fps: float, heads: Sequence[ServedHead] = ()) -> None:
        self._path, self._fps, self._heads = path, fps, heads
        self._video: cv2.VideoWriter | None = None
        self._basis: np.ndarray | None = None
        self._top = 1.0

    def write(self, result: StreamResult) -> None:
        """Add a frame."""
        dense = result.dense
        height, width = HEIGHT, 2 * round(HEIGHT * result.image.shape[1] / result.image.shape[0] / 2)
        if self._video is None:
            self._basis = components([dense.features[0]]) if FEATURES in dense.outputs() else None
            panels = 2 + (self._basis is not None) + len(self._heads)
            self._top = 3 * (dense.norm_median or float(np.median(dense.token_norm)))
            self._video = cv2.VideoWriter(
                str(self._path), cv2.VideoWriter.fourcc(*"mp4v"), self._fps, (panels * width, height)
            )
            if not self._video.isOpened():
                raise PhregError(f"write: OpenCV cannot write {self._path}; expected a name that ends in .mp4.")
        side = max(height, width)
        pictures = (Image.fromarray(result.image), heat(dense.token_norm[0], self._top, side))
        drawn = [np.asarray(picture.resize((width, height))) for picture in pictures]
        drawn[1] = (SHARE * drawn[1] + (1 - SHARE) * drawn[0]).astype(np.uint8)
        if self._basis is not None:
            drawn.append(np.asarray(colours(dense.features[0], self._basis, side).resize((width, height))))
        for head in self._heads:
            answer = draw_answer(result.image, head.kind, dense.heads[head.output][0], head.colours)
            drawn.append(np.asarray(answer.resize((width, height))))
        self._video.write(np.ascontiguousarray(np.concatenate(drawn, 1)[..., ::-1]))

    def close(self) -> None:
        """Finish the file."""
        if self._video is not None:
            self._video.release()
