"""Read the image out of a request: the body itself, or the field ``image`` of a form; never more than the limit."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from phreg_deploy.serving.requests.refusals import Refused

FIELD = "image"
# Fields of a form beside the image; their values are not read.
MOST_FIELDS = 8


async def read_upload(request: Request, limit: int) -> bytes:
    """Return the encoded image of a request.

    Raises:
        Refused: 413 for a body beyond ``limit`` bytes, 400 for a form that cannot be read, 422 for one without image.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        # ``Gate`` refuses a declared length; a chunked body declares none.
        if len(body) > limit:
            raise too_large(limit)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        return bytes(body)
    return await _read_form(request.headers, bytes(body))


def too_large(limit: int) -> Refused:
    """Return the refusal of a body beyond ``limit`` bytes."""
    return Refused(
        413, f"body: it is larger than {limit / 2**20:g} MiB, the limit of this service. Send a smaller image."
    )


class _InMemory(MultiPartParser):
    """Keeps files in memory: the body is bounded, and the disk may be read-only."""

    # The second name is that of older versions of Starlette.
    spool_max_size = max_file_size = 1 << 40


async def _read_form(headers: Headers, body: bytes) -> bytes:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await _InMemory(headers, whole(), max_files=1, max_fields=MOST_FIELDS).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        why = getattr(error, "message", str(error))
        raise Refused(
            400, f"form: it cannot be read ({why}); expected multipart/form-data with one file in the field {FIELD!r}."
        ) from None
    file = form.get(FIELD)
    try:
        if isinstance(file, UploadFile):
            return await file.read()
    finally:
        await form.close()
    raise Refused(
        422,
        f"form: it has no file in the field {FIELD!r}. With curl: -F {FIELD}=@photo.jpg, or --data-binary @photo.jpg "
        "without a form.",
    )
