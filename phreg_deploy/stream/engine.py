"""``Engine``: the extractor that runs, and the one that takes its place when it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.images.fitting import Fitted
from phreg_deploy.runtime.backends.registry import check_name
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.stream.frames import Frame

Fallback = str | Callable[[], FeatureExtractor]


class Engine:
    """Runs frames on one extractor; after a failure on a fall-back for the rest of the stream.

    Args:
        fallback: the name of a backend to open the same bundle with, or a function that returns an extractor.
        size, fit: as in a call of the extractor.
        said: is called with a message when the fall-back takes over.

    Raises:
        PhregError: a name that is no backend's.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        fallback: Fallback | None,
        size: tuple[int, int] | None,
        fit: str | None,
        said: Callable[[str], None],
    ) -> None:
        if isinstance(fallback, str) and fallback != "auto":
            check_name(fallback)
        self._extractor, self._fallback, self._said = extractor, fallback, said
        self._size, self._fit = size, fit
        self._opened: FeatureExtractor | None = None

    @property
    def backend(self) -> str:
        """The name of the backend that runs."""
        return self._extractor.backend

    def fitted(self, frame: Frame) -> Fitted:
        """The frame as the model reads it. Raises ``PhregError`` for one that is no image."""
        return self._extractor.fitted(frame.image, self._size, color=frame.color, fit=self._fit)

    def run(self, fitted: Fitted) -> DenseFeatures:
        """Features of the frame, B is 1.

        Raises:
            PhregError: no fall-back serves it either. Other errors: the backend's own, without a fall-back.
        """
        try:
            return self._dense(fitted)
        except Exception as error:  # backends raise errors of many kinds
            if self._fallback is None:
                raise
            self._replace(error)
        return self._dense(fitted)

    def close(self) -> None:
        """Close the fall-back, if it was opened; the first extractor belongs to the caller."""
        if self._opened is not None:
            self._opened.close()

    def _dense(self, fitted: Fitted) -> DenseFeatures:
        mask = None if fitted.mask is None else fitted.mask[None]
        return self._extractor.dense(fitted.image[None]).masked(mask)

    def _replace(self, error: Exception) -> None:
        first, fallback, self._fallback = self._extractor, self._fallback, None
        name = first.manifest.model.architecture
        try:
            if callable(fallback):
                self._opened = fallback()
            else:
                how: dict[str, Any] = {"color": first.color, "public_key": first.public_key}
                self._opened = FeatureExtractor.load(first.bundle.folder, str(fallback), **how)
                self._opened.preprocess = first.preprocess
        except PhregError as second:
            raise PhregError(f"stream: the backend failed ({error}), and so did its fall-back: {second}") from error
        self._extractor = self._opened
        self._said(f"the backend failed ({error}); {self.backend} serves {name} from now on")
