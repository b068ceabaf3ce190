"""examples/segmentation_service.py under uvicorn in a process of its own: answers, limits, metrics, a graceful end."""

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import ROOT

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")


@contextmanager
def running(bundle, *options):
    """Start the service on a free port and wait until it answers; yield a client and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "examples/segmentation_service.py", bundle, "--port", port, "--threads", 1]
    process = subprocess.Popen(
        [*map(str, command), "--backend", "onnxruntime-cpu", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        try:
            for _ in range(300):
                assert process.poll() is None, process.stdout.read()
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            yield client, process
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def service(alone_bundle):
    with running(alone_bundle, "--max-mib", "0.5", "--max-megapixels", "0.2") as (client, _):
        yield client


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def post(client, path, data):
    return client.post(path, files={"image": ("image", data)})


def picture_of(response):
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png"), response.text
    return Image.open(io.BytesIO(response.content))


def test_labels_and_overlay_are_the_bundles(service, labels_bundle, demo_scenes):
    scene = demo_scenes / "images" / "0004.png"
    labels = picture_of(post(service, "/labels", scene.read_bytes()))
    with FeatureExtractor.load(labels_bundle, "onnxruntime-cpu") as extractor:
        expected = extractor(scene).labels[0]
    assert labels.mode == "P"
    np.testing.assert_array_equal(np.asarray(labels), expected)
    classes = service.get("/classes").json()
    assert [entry["name"] for entry in classes] == (demo_scenes / "names.txt").read_text().split("\n")
    colours = np.array([entry["colour"] for entry in classes])
    overlay = np.asarray(picture_of(post(service, "/overlay", scene.read_bytes()))).astype(int)
    blended = (np.asarray(Image.open(scene)).astype(int) + colours[expected]) / 2
    assert np.abs(overlay - blended).max() <= 1


def test_a_photograph_is_labelled_upright_at_its_own_size(service, demo_scenes):
    scene = Image.open(demo_scenes / "images" / "0005.png").resize((300, 200))
    exif = Image.Exif()
    exif[274] = 6  # shown, it is turned by a quarter
    turned = picture_of(post(service, "/labels", encoded(scene.transpose(Image.Transpose.ROTATE_90), exif=exif)))
    plain = picture_of(post(service, "/labels", encoded(scene)))
    assert turned.size == plain.size == (300, 200)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(plain))
    assert len(np.unique(np.asarray(plain))) > 2


@pytest.mark.parametrize("data", [b"not an image", b"", "truncated"])
def test_a_bad_image_is_refused_with_the_reason(service, demo_scenes, data):
    if data == "truncated":
        whole = encoded(Image.open(demo_scenes / "images" / "0004.png"), "JPEG")
        data = whole[: len(whole) // 2]
    response = post(service, "/labels", data)
    assert response.status_code == 422
    assert "image" in response.json()["detail"]
    assert service.post("/labels").status_code == 422


def test_uploads_beyond_the_limits_are_refused(service):
    response = post(service, "/labels", bytes(600_000))
    assert (response.status_code, response.json()["detail"]) == (413, "the upload is larger than 0.5 MiB")
    boundary = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    parts = (part for part in [boundary, *[bytes(100_000)] * 6, b"\r\n--x--\r\n"])
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = service.post("/labels", content=parts, headers=headers)  # chunked: without a length
    assert (response.status_code, response.json()["detail"]) == (413, "the upload is larger than 0.5 MiB")
    response = post(service, "/labels", encoded(Image.new("RGB", (1000, 300))))
    assert response.status_code == 413
    assert "the image has 1000x300 pixels; expected at most 0.2 megapixels" in response.json()["detail"]
    assert service.get("/health").json()["status"] == "ok"


def test_metrics_count_images_latencies_and_the_artifact_rate(service, labels_bundle, demo_scenes):
    def figures():
        text = service.get("/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(\S+) ([\d.e+-]+)$", text, re.M)}

    before = figures()
    scenes = sorted((demo_scenes / "images").iterdir())[:3]
    for scene in scenes:
        assert post(service, "/labels", scene.read_bytes()).status_code == 200
    assert post(service, "/labels", b"x").status_code == 422
    after = figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['phreg_requests_total{route="/labels",status="200"}'] == 3
    assert grown['phreg_requests_total{route="/labels",status="422"}'] == 1
    assert grown["phreg_latency_seconds_count"] == grown['phreg_latency_seconds_bucket{le="+Inf"}'] == 3
    assert 0 < grown["phreg_latency_seconds_sum"] < 30
    assert after["phreg_artifact_rate"] == pytest.approx(5 / 256, abs=0.01), "the demo model has five outlier tokens"
    assert after["phreg_waiting"] == 0


def test_it_ends_gracefully_and_refuses_a_bundle_without_head(labels_bundle, demo_bundle):
    with running(labels_bundle) as (client, process):
        assert client.get("/health").json()["backend"] == "onnxruntime-cpu"
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
        assert "Application shutdown complete" in said
    command = [sys.executable, "examples/segmentation_service.py", str(demo_bundle), "--backend", "onnxruntime-cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("The bundle has no segmentation head without a name.")


def test_images_beyond_the_queue_are_refused(labels_bundle, demo_scenes):
    """In this process: one image that never ends its turn, one that waits, and a third one."""
    import threading

    from examples.segmentation_service import create_app

    class Held:
        """An extractor that holds its call until it is told to go on."""

        def __init__(self, extractor):
            self.manifest, self.backend, self.precision = extractor.manifest, extractor.backend, extractor.precision
            self.extractor, self.go, self.close = extractor, threading.Event(), extractor.close

        def __call__(self, *arguments, **options):
            assert self.go.wait(20)
            return self.extractor(*arguments, **options)

    data = (demo_scenes / "images" / "0004.png").read_bytes()

    async def three(held):
        app = create_app(held, queue=1)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            ask = lambda: client.post("/labels", files={"image": ("image", data)})  # noqa: E731
            asked = [asyncio.ensure_future(ask()) for _ in range(2)]
            while (await client.get("/health")).json()["waiting"] < 2:
                await asyncio.sleep(0.01)
            refused = await ask()
            held.go.set()
            return refused, [response.status_code for response in await asyncio.gather(*asked)]

    with FeatureExtractor.load(labels_bundle, "onnxruntime-cpu") as extractor:
        refused, served = asyncio.run(three(Held(extractor)))
    assert (refused.status_code, refused.headers["retry-after"], served) == (503, "1", [200, 200])
