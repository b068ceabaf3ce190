"""``ServedModel``: a loaded bundle with its batcher, and the names under which bundles are served."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.serving.batching import Batcher, QueueFull, Served, Stopped
from phreg_deploy.serving.limits import ServiceLimits
from phreg_deploy.serving.metrics import Metrics

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def name_bundles(given: Sequence[str]) -> dict[str, Path]:
    """Read ``PATH`` or ``NAME=PATH``; without a name it is that of the folder, less ``.bundle``.

    Raises:
        PhregError: two bundles of one name, or a name with other characters than an address takes.
    """
    bundles: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or Path(text).exists():
            name, path = Path(text).resolve().name.removesuffix(".bundle"), text
        if not NAME.fullmatch(name):
            raise PhregError(
                f"serve: got the name {name[:80]!r}, expected letters, digits, '.', '_' and '-'. Give one: NAME=PATH."
            )
        if name in bundles:
            raise PhregError(
                f"serve: got two bundles named {name}; give them names: first={bundles[name]} second={path}."
            )
        bundles[name] = Path(path)
    return bundles


class ServedModel:
    """A bundle that is served. ``healthy``: whether its last run succeeded."""

    def __init__(self, name: str, extractor: FeatureExtractor, limits: ServiceLimits, metrics: Metrics) -> None:
        self.name, self.extractor, self.healthy, self._metrics = name, extractor, True, metrics
        manifest = extractor.manifest
        self.most = min(limits.batch or manifest.batches.best, manifest.batches.highest)
        self.batcher = Batcher(
            extractor.dense, most=self.most, wait=limits.wait, queue=limits.queue, observe=self._observe
        )
        self._probe: Future[Served] | None = None
        metrics.waiting.labels(name).set_function(lambda: self.batcher.waiting)
        graph = manifest.files.get("model.onnx", "")
        metrics.model.labels(name, extractor.backend, extractor.precision, graph[:16]).set(1)

    def warm(self) -> None:
        """Run a batch at the preferred size, so that the first request does not pay for it."""
        self.extractor.dense(np.zeros((self.most, *self.extractor.manifest.sizes.default, 3), np.uint8))

    def probe(self) -> None:
        """Queue an image of zeros, unless the last one still waits: its run says whether the backend works again."""
        if self._probe is None or self._probe.done():
            # Where images wait, their runs will say it.
            with contextlib.suppress(QueueFull, Stopped):
                self._probe = self.batcher.submit(np.zeros((*self.extractor.manifest.sizes.default, 3), np.uint8))

    def facts(self) -> dict[str, Any]:
        """Return what a client must know of the bundle, as JSON."""
        manifest = self.extractor.manifest
        source = {key: manifest.source[key] for key in ("model", "license", "distilled") if key in manifest.source}
        heads = [{"output": head.output, **head.to_json()} for head in manifest.heads]
        return {
            "name": self.name,
            "backend": self.extractor.backend,
            "precision": self.extractor.precision,
            "model": manifest.model.to_json(),
            "preprocess": self.extractor.preprocess.to_json(),
            "sizes": manifest.sizes.to_json(),
            "batch": self.most,
            "outputs": manifest.outputs,
            "heads": heads,
            "norm_median": manifest.norm_median,
            "source": source,
            "random_weights": manifest.random_weights,
            "graph_sha256": manifest.files.get("model.onnx"),
        }

    def close(self) -> None:
        """Finish the images that wait, and free the backend."""
        self.batcher.close()
        self.extractor.close()

    def _observe(self, size: int, seconds: float | None) -> None:
        self.healthy = seconds is not None
        self._metrics.ran(self.name, size, seconds)
