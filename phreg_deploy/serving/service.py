"""``Service``: from the bytes of an upload to those of an answer, over the models, their batchers and a few threads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.serving.batching import QueueFull, Stopped
from phreg_deploy.serving.limits import ServiceLimits
from phreg_deploy.serving.metrics import Metrics
from phreg_deploy.serving.models import ServedModel
from phreg_deploy.serving.requests.decoding import Upload, decode
from phreg_deploy.serving.requests.refusals import Refused
from phreg_deploy.spec import parse_size

T = TypeVar("T")
# Makes the body of an answer.
Encode = Callable[[DenseFeatures, Upload], bytes]
# Threads that decode and encode; each may hold a whole picture.
MOST_THREADS = 4


@dataclass(frozen=True)
class ImageOptions:
    """How an image is fitted. ``size``: text such as "480x640". ``picture``: whether the encoder needs the picture."""

    size: str | None = None
    fit: str | None = None
    picture: bool = False


@dataclass(frozen=True)
class Answer:
    """``body``: encoded. ``headers``: the model, the artifact rate (0-1), images in the run, milliseconds by stage."""

    body: bytes
    headers: dict[str, str]


class Service:
    """Serves several bundles. ``close`` frees them."""

    def __init__(self, extractors: Mapping[str, FeatureExtractor], limits: ServiceLimits) -> None:
        self.limits, self.metrics = limits, Metrics()
        self._closing = ExitStack()
        self.models: dict[str, ServedModel] = {}
        self._threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "phreg-images")
        self._closing.callback(self._threads.shutdown)
        for name, extractor in extractors.items():
            self.models[name] = ServedModel(name, extractor, limits, self.metrics)
            self._closing.callback(self.models[name].close)

    @property
    def capacity(self) -> int:
        """Requests that are accepted at a time: those that wait, run, are decoded and are encoded."""
        return sum(self.limits.queue + 2 * model.most for model in self.models.values())

    def find(self, name: str | None) -> ServedModel:
        """Return the model of this name; None for the only one.

        Raises:
            Refused: another name, or none where several are served.
        """
        names = ", ".join(self.models)
        if name is None and len(self.models) > 1:
            raise Refused(422, f"model: got no name, and several bundles are served; expected one of {names}.")
        found = next(iter(self.models.values())) if name is None else self.models.get(name)
        if found is None:
            raise Refused(404, f"model: got {str(name)[:80]!r}, expected one of {names}.")
        return found

    async def answer(
        self,
        data: bytes,
        model: ServedModel,
        options: ImageOptions,
        encode: Encode,
        began: float,
    ) -> Answer:
        """Decode an upload, run it with others, and encode the answer; ``began``: of ``time.perf_counter``.

        Raises:
            Refused: see ``decode``; 503 while the queue is full or the service stops.
        """
        read = time.perf_counter()
        size = _size(options.size, model.extractor.manifest)
        fit, picture, pixels = options.fit, options.picture, self.limits.pixels
        upload = await self._thread(partial(decode, data, model.extractor, pixels, size=size, fit=fit, picture=picture))
        decoded = time.perf_counter()
        try:
            served = await asyncio.wrap_future(model.batcher.submit(upload.image))
        except (QueueFull, Stopped) as error:
            raise Refused(503, str(error), retry=1) from None
        dense = served.dense.masked(None if upload.mask is None else upload.mask[None])
        ran = time.perf_counter()
        body = await self._thread(partial(encode, dense, upload))
        done = time.perf_counter()
        rate = float(dense.artifact_rate[0])
        seconds = {"read": read - began, "decode": decoded - read, "queue": served.queued, "run": served.ran}
        seconds |= {"encode": done - ran, "total": done - began}
        self.metrics.served(model.name, rate, seconds)
        timing = ", ".join(f"{stage};dur={1e3 * value:.2f}" for stage, value in seconds.items())
        headers = {"x-phreg-model": model.name, "x-phreg-artifact-rate": f"{rate:.6f}"}
        return Answer(body, {**headers, "x-phreg-batch": str(served.batch), "server-timing": timing})

    async def _thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        """Finish what was accepted, and free the backends."""
        self._closing.close()


def _size(text: str | None, manifest: Manifest) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        size = parse_size(text[:40])
        manifest.sizes.check(size, manifest.model.patch)
        return size
    except PhregError as error:
        raise Refused(422, str(error)) from None
