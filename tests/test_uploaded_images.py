"""Uploaded images: bounds by the header alone, the size of giant and turned JPEGs, and nothing global that changes."""

import asyncio
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.serving.limits import ServiceLimits
from phreg_deploy.serving.requests.decoding import decode
from phreg_deploy.serving.requests.refusals import Refused
from tests.service_helpers import encoded, httpx

pytest.importorskip("starlette")
pytest.importorskip("python_multipart")
pytest.importorskip("onnxruntime")
BOUND = 50_000_000


@pytest.fixture(scope="module")
def extractor(wide_bundle):
    with FeatureExtractor.load(wide_bundle, "onnxruntime-cpu", threads=1) as extractor:
        yield extractor


def png_that_promises(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("side", "got"), [(8000, "8000x8000"), (12_000, "far more"), (60_000, "far more")])
def test_a_header_that_promises_too_many_pixels_is_413(extractor, side, got):
    """Pillow itself warns above 89 megapixels and raises above 179."""
    with pytest.raises(Refused, match=f"{got} pixels, expected at most 50 megapixels") as refused:
        decode(png_that_promises(side, side), extractor, BOUND)
    assert refused.value.status == 413


def test_a_service_cannot_be_told_to_take_more_pixels_than_pillow_decodes():
    assert ServiceLimits(megapixels=89).pixels <= Image.MAX_IMAGE_PIXELS
    with pytest.raises(PhregError, match="got 90 for megapixels"):
        ServiceLimits(megapixels=90)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("exif", [False, True])
def test_a_giant_jpeg_keeps_the_size_of_its_file(extractor, monkeypatch, orientation, exif):
    monkeypatch.setattr("phreg_deploy.images.decoding.GIANT", 1 << 14)
    monkeypatch.setattr(extractor, "preprocess", replace(extractor.preprocess, exif=exif))
    tag = Image.Exif()
    tag[0x0112] = orientation
    upload = decode(encoded(Image.new("RGB", (801, 300)), "JPEG", exif=tag), extractor, BOUND, picture=True)
    turned = exif and orientation == 6
    assert upload.size == ((801, 300) if turned else (300, 801))
    assert upload.picture.size == ((75, 201) if turned else (201, 75)), "it was decoded at a quarter"


def test_threads_that_decode_leave_the_filters_of_warnings_alone(extractor):
    data, before = encoded(Image.new("RGB", (400, 300)), "JPEG"), list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode(data, extractor, BOUND), range(400)))
    assert list(warnings.filters) == before


def test_a_form_is_never_written_to_the_disk(monkeypatch, tmp_path):
    """It may be read-only; Starlette writes a file above 1 MiB unless it is told otherwise, by a name that changed."""
    from starlette.requests import Request

    from phreg_deploy.serving.requests.uploads import read_upload

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "there is no such folder"))
    data = bytes(3 << 20)
    request = httpx.Request("POST", "http://service/", files={"image": data})
    headers = [(name.lower(), value) for name, value in request.headers.raw]
    scope = {"type": "http", "method": "POST", "headers": headers}

    async def receive():
        return {"type": "http.request", "body": request.read(), "more_body": False}

    assert asyncio.run(read_upload(Request(scope, receive), 4 << 20)) == data
