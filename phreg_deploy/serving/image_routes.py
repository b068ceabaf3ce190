"""The routes that take an image, and their description in OpenAPI: features, labels, overlays and artifact tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.layers import LABELS, SEGMENTATION
from phreg_deploy.runtime.dense_features import DenseFeatures
from phreg_deploy.serving.requests import answers
from phreg_deploy.serving.requests.decoding import FORMATS, Upload
from phreg_deploy.serving.requests.refusals import Refused
from phreg_deploy.serving.requests.uploads import FIELD, read_upload
from phreg_deploy.serving.service import Answer, Encode, ImageOptions, Service

# Checks the options of a request against the bundle, and returns what encodes its answer.
Prepare = Callable[[Manifest], Encode]


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


def add_image_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that take an image."""

    async def run(request: Request, model: str | None, options: ImageOptions, prepare: Prepare) -> Answer:
        """``prepare`` checks the options against the bundle, before the body is read, and returns the encoder."""
        began, found = time.perf_counter(), service.find(model)
        encode = prepare(found.extractor.manifest)
        return await service.answer(await read_upload(request, service.limits.bytes), found, options, encode, began)

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

        def prepare(manifest: Manifest) -> Encode:
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

        return _response(await run(request, model, ImageOptions(size, fit), prepare), format)

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

        def prepare(manifest: Manifest) -> Encode:
            found = answers.find_head(manifest, head, (LABELS, SEGMENTATION))

            def encode(dense: DenseFeatures, upload: Upload) -> bytes:
                classes = answers.class_map(dense, found)
                if format == "npy":
                    return answers.encode("npy", {"labels": classes}, {})
                return answers.label_png(classes, found, upload.size)

            return encode

        return _response(await run(request, model, ImageOptions(size, "squash"), prepare), format)

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

        def prepare(manifest: Manifest) -> Encode:
            what = answers.check_drawn(of, manifest)

            def encode(dense: DenseFeatures, upload: Upload) -> bytes:
                assert upload.picture is not None
                return answers.draw(dense, upload.picture, what, manifest)

            return encode

        return _response(await run(request, model, ImageOptions(size, "squash", picture=True), prepare), "png")

    @app.post("/artifacts", summary="Artifact tokens", **described("Shares and norms.", "json"))
    async def artifacts(request: Request, model: MODEL = None, size: SIZE = None, fit: FIT = None) -> Response:
        """The share of artifact tokens (0-1), and the smallest, median and largest token norm."""

        def prepare(_manifest: Manifest) -> Encode:
            return lambda dense, upload: answers.artifact_json(dense, upload.mask)

        return _response(await run(request, model, ImageOptions(size, fit), prepare), "json")


def _response(answer: Answer, kind: str) -> Response:
    return Response(answer.body, media_type=answers.MEDIA[kind], headers=answer.headers)
