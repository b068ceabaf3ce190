"""Serve a bundle with a segmentation head over HTTP: an image in, a label map or an overlay out.

    python examples/segmentation_service.py labels.bundle --port 8000
    curl -F image=@photo.jpg localhost:8000/labels -o labels.png
    curl -F image=@photo.jpg localhost:8000/overlay -o overlay.png

`/classes` names the classes, `/health` says what runs, and `/metrics` is read by Prometheus. The label map is a PNG
with a palette, of the size of the upright image; its values are the classes.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from phreg_deploy.errors import PhregError
from phreg_deploy.images.intake import rgb
from phreg_deploy.runtime import FeatureExtractor

# Images over which the artifact rate is averaged; seconds of the histogram's buckets; share of the colours in overlays.
WINDOW, BUCKETS, SHARE = 100, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0), 0.5


class UploadLimit:
    """ASGI middleware that refuses a body beyond ``limit`` bytes with 413, before it is read into memory or to disk."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        detail = f"the upload is larger than {self.limit / 2**20:g} MiB"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if int(declared) > self.limit:
            await Response(f'{{"detail":"{detail}"}}', 413, media_type="application/json")(scope, receive, send)
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:  # a chunked upload declares no length
                raise HTTPException(413, detail)
            return message

        await self.app(scope, counted, send)


class Metrics:
    """What ``/metrics`` reports."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("phreg_requests_total", "Requests.", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "phreg_latency_seconds",
            "Decoding, features and labels of an image.",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.rate = Gauge(
            "phreg_artifact_rate", f"Mean artifact rate of the last {WINDOW} images.", registry=self.registry
        )
        self.waiting = Gauge("phreg_waiting", "Images that wait or run.", registry=self.registry)
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def observe(self, seconds: float, rate: float) -> None:
        self.seconds.observe(seconds)
        self.recent.append(rate)
        self.rate.set(float(np.mean(self.recent)))


def create_app(
    extractor: FeatureExtractor,
    *,
    max_bytes: int = 20 << 20,
    max_pixels: int = 50_000_000,
    parallel: int = 1,
    queue: int = 16,
) -> FastAPI:
    """Make the service of an extractor whose bundle has a segmentation head; the service closes it at its end.

    Args:
        max_bytes, max_pixels: limits of an upload. parallel: images at a time. queue: images that may wait for a turn.
    """
    heads = [head for head in extractor.manifest.heads if head.kind in ("segmentation", "labels") and not head.name]
    if not heads:
        raise SystemExit("The bundle has no segmentation head without a name. Attach one: phreg-deploy attach --help")
    (head,) = heads
    spread = np.arange(256)[:, None] * (37, 97, 173) % 256  # for a head without colours
    palette = np.array(head.colours or spread, np.uint8)
    metrics, turn = Metrics(), asyncio.Semaphore(parallel)
    waiting = 0

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        extractor.close()

    app = FastAPI(title="phreg-deploy segmentation", lifespan=lifespan)
    app.add_middleware(UploadLimit, limit=max_bytes)

    @app.middleware("http")
    async def count(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(request)
        route = getattr(request.scope.get("route"), "path", "other")
        metrics.requests.labels(route, response.status_code).inc()
        return response

    def segment(data: bytes) -> tuple[Image.Image, np.ndarray]:
        """Return the upright image and its classes, uint8 of the same height and width."""
        started = time.perf_counter()
        try:
            with Image.open(io.BytesIO(data)) as header:  # reads no pixel yet
                if header.width * header.height > max_pixels:
                    got = f"{header.width}x{header.height} pixels"
                    raise HTTPException(413, f"the image has {got}; expected at most {max_pixels / 1e6:g} megapixels")
            picture = Image.fromarray(np.asarray(rgb(data, exif=True)))
        except (PhregError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise HTTPException(422, f"image: it cannot be decoded ({error}); expected a JPEG, PNG or WebP") from None
        dense = extractor(picture, fit="squash")
        assert dense.labels is not None
        labels = Image.fromarray(dense.labels[0]).resize(picture.size, Image.Resampling.NEAREST)
        metrics.observe(time.perf_counter() - started, float(dense.artifact_rate[0]))
        return picture, np.asarray(labels)

    async def run(upload: UploadFile) -> tuple[Image.Image, np.ndarray]:
        nonlocal waiting
        if waiting >= parallel + queue:
            raise HTTPException(503, "too many images wait", {"Retry-After": "1"})
        data = await upload.read()
        waiting += 1
        metrics.waiting.set(waiting)
        try:
            async with turn:
                return await run_in_threadpool(segment, data)
        finally:
            waiting -= 1
            metrics.waiting.set(waiting)

    def png(picture: Image.Image) -> Response:
        out = io.BytesIO()
        picture.save(out, "PNG")
        return Response(out.getvalue(), media_type="image/png")

    @app.post("/labels", response_class=Response)
    async def label_map(image: UploadFile) -> Response:
        """Classes of the pixels, as a PNG with a palette."""
        _, labels = await run(image)
        picture = Image.fromarray(labels)
        picture.putpalette(np.resize(palette, (256, 3)).tobytes())
        return png(picture)

    @app.post("/overlay", response_class=Response)
    async def overlay(image: UploadFile) -> Response:
        """The image with the colours of the classes over it, as a PNG."""
        picture, labels = await run(image)
        return png(Image.blend(picture, Image.fromarray(palette[labels]), SHARE))

    @app.get("/classes")
    async def classes() -> list[dict[str, Any]]:
        return [{"value": k, "name": name, "colour": palette[k].tolist()} for k, name in enumerate(head.classes)]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "backend": extractor.backend, "precision": extractor.precision, "waiting": waiting}

    @app.get("/metrics")
    async def report() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="with a segmentation head, of phreg-deploy attach")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-mib", type=float, default=20, help="largest upload")
    parser.add_argument("--max-megapixels", type=float, default=50, help="largest image")
    parser.add_argument("--parallel", type=int, default=1, help="images at a time")
    parser.add_argument("--queue", type=int, default=16, help="images that may wait; more are refused with 503")
    given = parser.parse_args()
    try:
        extractor = FeatureExtractor.load(given.bundle, given.backend, threads=given.threads)
    except PhregError as error:
        raise SystemExit(str(error)) from None
    pixels = int(given.max_megapixels * 1e6)
    app = create_app(
        extractor, max_bytes=int(given.max_mib * 2**20), max_pixels=pixels, parallel=given.parallel, queue=given.queue
    )
    # After SIGTERM or Ctrl-C, requests that run are finished, for at most ten seconds.
    uvicorn.run(app, host=given.host, port=given.port, timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
