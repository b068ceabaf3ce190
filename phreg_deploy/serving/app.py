"""The routes of the service, and the description of them that clients read (OpenAPI)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from phreg_deploy import __version__
from phreg_deploy.layers import LABELS, SEGMENTATION
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.serving.gate import Gate
from phreg_deploy.serving.requests import answers
from phreg_deploy.serving.requests.access import TokenCheck
from phreg_deploy.serving.requests.decoding import FORMATS, Upload
from phreg_deploy.serving.requests.refusals import Refused
from phreg_deploy.serving.requests.uploads import FIELD, read_upload
from phreg_deploy.serving.service import Answer, How, Service


class Problem(BaseModel):
    """Why a request was not served: what was got, what was expected, and what to do."""

    detail: str


MODEL = Annotated[str | None, Query(description="Name of the bundle, of /info; needed where several are served.")]
SIZE = Annotated[str | None, Query(description="Input size, 518 or 480x640; by default the bundle's preferred one.")]
FIT = Annotated[
    Literal["pad", "crop", "squash"] | None,
    Query(description="How the image meets the input size; by default as the bundle says."),
]
BINARY = {"schema": {"type": "string", "format": "binary"}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in (
        (400, "A form that cannot be read."),
        (401, "No token, or a wrong one."),
        (404, "A bundle that is not served."),
        (408, "The body arrived too slowly."),
        (413, "Too many bytes or pixels."),
        (422, "No image, or an option that the bundle does not serve."),
        (503, "The queue is full, or the service stops; ask again after Retry-After."),
        (504, "No answer in time."),
    )
}
IMAGE = {
    "requestBody": {
        "required": True,
        "description": f"One image: {', '.join(FORMATS)}; the body itself, or the field {FIELD!r} of a form.",
        "content": {
            "image/*": BINARY,
            "application/octet-stream": BINARY,
            "multipart/form-data": {
                "schema": {"type": "object", "required": [FIELD], "properties": {FIELD: BINARY["schema"]}}
            },
        },
    }
}


def create_app(service: Service, token: TokenCheck | None = None) -> FastAPI:
    """Make the ASGI application of a service, which it closes at its end; ``app.state.gate`` counts requests."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="phreg-deploy",
        version=__version__,
        summary="Clean dense features of images.",
        lifespan=lifespan,
        redoc_url=None,
        # Documents the token; ``Gate`` checks it.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [],
    )
    state = app.state

    def guarded(app: Any) -> Gate:
        state.gate = Gate(app, service.limits, service.metrics, token, service.capacity)
        return state.gate  # type: ignore[no-any-return]

    app.add_middleware(guarded)  # type: ignore[arg-type]
    _add_errors(app)
    _add_images(app, service)
    _add_facts(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(
            f"{part['loc'][-1]}: got {str(part['input'])[:60]!r}, {part['msg']}" for part in error.errors()
        )
        return JSONResponse({"detail": said}, 422)

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse(
            {"detail": "serve: this service failed; its log says why. Ask again, or tell its owner."}, 500
        )


def _add_images(app: FastAPI, service: Service) -> None:
    async def run(request: Request, model: str | None, how: How, prepare: Any) -> Answer:
        """``prepare`` checks the options against the bundle, before the body is read, and returns the encoder."""
        began, found = time.perf_counter(), service.find(model)
        encode = prepare(found.extractor.manifest)
        return await service.answer(await read_upload(request, service.limits.bytes), found, how, encode, began)

    def described(text: str, *media: str) -> dict[str, Any]:
        content = {answers.MEDIA[kind]: BINARY if kind != "json" else {} for kind in media}
        shared = {"response_class": Response, "openapi_extra": IMAGE, "tags": ["images"]}
        return {"responses": {200: {"description": text, "content": content}, **PROBLEMS}, **shared}

    @app.post("/features", summary="Dense features", **described("Arrays.", "npy", "npz", "arrow", "json"))
    async def features(
        request: Request,
        outputs: Annotated[str, Query(description="Outputs of the bundle, e.g. features,cls,token_norm.")] = "features",
        format: Annotated[Literal["npy", "npz", "arrow", "json"], Query(description="npy holds one output.")] = "npy",
        dtype: Annotated[Literal["float32", "float16"], Query(description="Of what is not a class.")] = "float32",
        model: MODEL = None,
        size: SIZE = None,
        fit: FIT = None,
    ) -> Response:
        """Features `(Hp, Wp, C)`, class token `(C,)`, token norms `(Hp, Wp)`, labels and the other outputs of a bundle.

        With `fit=pad`, npz, Arrow and JSON have `mask` `(Hp, Wp)` too: the patches that are image.
        """

        def prepare(manifest: Any) -> Any:
            names = answers.check_outputs(outputs, manifest)
            if format == "npy" and len(names) > 1:
                raise Refused(422, f"format: got npy for {len(names)} outputs, expected npz, arrow or json.")
            if format == "arrow":
                answers.check_arrow()

            def encode(dense: DenseFeatures, upload: Upload) -> bytes:
                arrays = answers.arrays_of(dense, names, dtype, None if format == "npy" else upload.mask)
                facts = {"artifact_rate": float(dense.artifact_rate[0]), "size": list(upload.size)}
                return answers.encode(format, arrays, facts)

            return encode

        return _response(await run(request, model, How(size, fit), prepare), format)

    @app.post(
        "/labels", summary="Classes of the pixels", **described("A PNG with a palette, or an array.", "png", "npy")
    )
    async def labels(
        request: Request,
        head: Annotated[str | None, Query(description="Output of the head; needed where there are several.")] = None,
        format: Annotated[Literal["png", "npy"], Query()] = "png",
        model: MODEL = None,
        size: SIZE = None,
    ) -> Response:
        """PNG: the class of every pixel of the upright image, by the nearest answer. npy: the answers, uint8 `(h, w)`.

        The whole image is resized (`fit=squash`), so that every pixel has a class.
        """

        def prepare(manifest: Any) -> Any:
            found = answers.find_head(manifest, head, (LABELS, SEGMENTATION))

            def encode(dense: DenseFeatures, upload: Upload) -> bytes:
                classes = answers.class_map(dense, found)
                if format == "npy":
                    return answers.encode("npy", {"labels": classes}, {})
                return answers.label_png(classes, found, upload.size)

            return encode

        return _response(await run(request, model, How(size, "squash"), prepare), format)

    @app.post("/overlay", summary="A picture of an output", **described("A picture.", "png"))
    async def overlay(
        request: Request,
        of: Annotated[
            str | None,
            Query(description="Output of a head, token_norm or features; by default the only head, else token_norm."),
        ] = None,
        model: MODEL = None,
        size: SIZE = None,
    ) -> Response:
        """The upright image, at most 2048 pixels long, with classes or token norms over it; or depth, or features."""

        def prepare(manifest: Any) -> Any:
            what = answers.check_drawn(of, manifest)

            def encode(dense: DenseFeatures, upload: Upload) -> bytes:
                assert upload.picture is not None
                return answers.draw(dense, upload.picture, what, manifest)

            return encode

        return _response(await run(request, model, How(size, "squash", keep=True), prepare), "png")

    @app.post("/artifacts", summary="Artifact tokens", **described("Shares and norms.", "json"))
    async def artifacts(request: Request, model: MODEL = None, size: SIZE = None, fit: FIT = None) -> Response:
        """The share of artifact tokens (0-1), and the smallest, median and largest token norm."""

        def prepare(_manifest: Any) -> Any:
            return lambda dense, upload: answers.artifact_json(dense, upload.mask)

        return _response(await run(request, model, How(size, fit), prepare), "json")


def _response(answer: Answer, kind: str) -> Response:
    return Response(answer.body, media_type=answers.MEDIA[kind], headers=answer.headers)


def _add_facts(app: FastAPI, service: Service) -> None:
    def state() -> tuple[int, dict[str, Any]]:
        gate: Gate = app.state.gate
        sick = [name for name, model in service.models.items() if not model.healthy]
        status = "stopping" if gate.stopping else "failing" if sick else "ready"
        return (200 if status == "ready" else 503), {"status": status, "failing": sick, "active": gate.active}

    @app.get("/health/live", tags=["health"], summary="Whether the process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", tags=["health"], summary="Whether images are served", responses={503: {}})
    @app.get("/health", tags=["health"], summary="The same", include_in_schema=False)
    async def ready() -> JSONResponse:
        """200 while images are served; 503 while the service stops, or after a run that failed."""
        status, said = state()
        return JSONResponse(said, status)

    @app.get("/info", tags=["facts"], summary="Bundles and limits")
    async def info() -> dict[str, Any]:
        """What each bundle serves, from its manifest, and the limits of a request."""
        limits = service.limits
        bounds = {"bytes": limits.bytes, "pixels": limits.pixels, "seconds": limits.seconds, "queue": limits.queue}
        models = [model.facts() for model in service.models.values()]
        return {"version": __version__, "models": models, "limits": bounds, "formats": list(FORMATS)}

    @app.get("/metrics", tags=["facts"], summary="Metrics for Prometheus", response_class=Response)
    async def report() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
