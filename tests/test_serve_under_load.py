"""The service in this process: a full queue, late answers, slow bodies, a backend that fails, and the stop."""

import asyncio
import io
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest

from phreg_deploy.runtime import FeatureExtractor
from tests.service_helpers import httpx

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("onnxruntime")


class Held:
    """An extractor whose runs wait until they are let go, or fail."""

    def __init__(self, extractor):
        self.extractor, self.go, self.began, self.error = extractor, threading.Event(), threading.Event(), None

    def __getattr__(self, name):
        return getattr(self.extractor, name)

    def dense(self, batch):
        self.began.set()
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return self.extractor.dense(batch)

    def close(self):
        pass


@pytest.fixture(scope="module")
def extractor(wide_bundle):
    with FeatureExtractor.load(wide_bundle, "onnxruntime-cpu", threads=1) as extractor:
        yield extractor


@pytest.fixture
def held(extractor):
    held = Held(extractor)
    yield held
    held.go.set()


@pytest.fixture
def data(photos):
    return (photos / "frame-03.jpg").read_bytes()


@asynccontextmanager
async def opened(held, **bounds):
    """The application of one model with these limits, and a client of it."""
    from phreg_deploy.serving.app import create_app
    from phreg_deploy.serving.limits import ServiceLimits
    from phreg_deploy.serving.service import Service

    service = Service({"held": held}, ServiceLimits(**bounds))
    app = create_app(service)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        yield app, client
    held.go.set()
    service.close()


async def until(condition):
    for _ in range(2000):
        if await condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it never happened")


def waiting(client, count):
    async def found():
        return f'phreg_waiting_images{{model="held"}} {count}.0' in (await client.get("/metrics")).text

    return found


def test_a_bundle_of_heads_alone_is_served_without_features(request, data):
    from PIL import Image

    folder = request.getfixturevalue("alone_bundle")

    async def run(extractor):
        extractor.go.set()
        async with opened(extractor) as (_, client):
            paths = (
                "/labels",
                "/overlay",
                "/artifacts",
                "/overlay?of=features",
                "/features",
                "/features?outputs=labels",
            )
            return [await client.post(path, content=data) for path in paths]

    with FeatureExtractor.load(folder, "onnxruntime-cpu", threads=1) as extractor:
        expected = extractor(data, fit="squash")
        labels, overlay, artifacts, *refused, raw = asyncio.run(run(Held(extractor)))
        assert [labels.status_code, overlay.status_code, artifacts.status_code, raw.status_code] == [200] * 4
        upright = Image.open(io.BytesIO(data)).size
        drawn = np.asarray(Image.fromarray(expected.labels[0]).resize(upright, Image.Resampling.NEAREST))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(labels.content))), drawn)
    assert [response.status_code for response in refused] == [422, 422]
    assert "expected one of labels, token_norm" in refused[0].json()["detail"]
    assert "expected some of labels, token_norm" in refused[1].json()["detail"]


def test_images_beyond_the_queue_are_refused_and_the_others_are_batched(held, data):
    async def run():
        async with opened(held, queue=2, batch=2) as (_, client):
            asked = [asyncio.ensure_future(client.post("/artifacts", content=data))]
            await until(lambda: asyncio.to_thread(held.began.is_set))
            asked += [asyncio.ensure_future(client.post("/artifacts", content=data)) for _ in range(2)]
            await until(waiting(client, 2))
            refused = [await client.post("/artifacts", content=data)]
            held.go.set()
            return refused, await asyncio.gather(*asked)

    refused, served = asyncio.run(run())
    assert [(r.status_code, r.headers["retry-after"]) for r in refused] == [(503, "1")]
    assert [r.status_code for r in served] == [200, 200, 200]
    assert [r.headers["x-phreg-batch"] for r in served] == ["1", "2", "2"]


def test_a_late_answer_is_504_and_its_image_is_never_run(held, data):
    async def run():
        async with opened(held, queue=4, batch=1, seconds=0.3) as (app, client):
            late = await asyncio.gather(*(client.post("/artifacts", content=data) for _ in range(3)))
            assert app.state.gate.active == 0
            held.go.set()
            await until(waiting(client, 0))
            return late, await client.post("/artifacts", content=data), (await client.get("/metrics")).text

    late, then, metrics = asyncio.run(run())
    assert [response.status_code for response in late] == [504] * 3
    assert "no answer within 0.3 s" in late[0].json()["detail"]
    assert then.status_code == 200
    assert 'phreg_batch_images_sum{model="held"} 2.0' in metrics, "one ran when its time was over; two were dropped"


def test_a_body_that_comes_too_slowly_is_408(held, data):
    async def slowly():
        for byte in data[:50]:
            yield bytes([byte])
            await asyncio.sleep(0.02)

    async def run():
        async with opened(held, seconds=0.2) as (_, client):
            return await client.post("/artifacts", content=slowly())

    response = asyncio.run(run())
    assert (response.status_code, "had not arrived within 0.2 s" in response.text) == (408, True)


def test_a_failing_backend_is_500_and_not_ready_until_a_run_succeeds(held, data):
    held.go.set()

    async def run():
        async with opened(held) as (_, client):
            held.error = RuntimeError("the device is gone")
            failed, metrics = await client.post("/artifacts", content=data), (await client.get("/metrics")).text
            sick = await client.get("/health/ready")
            held.error = None
            served = await client.post("/artifacts", content=data)
            return failed, sick, served, await client.get("/health/ready"), metrics

    failed, sick, served, well, metrics = asyncio.run(run())
    assert (failed.status_code, "gone" in failed.text, "its log says why" in failed.text) == (500, False, True)
    assert (sick.status_code, sick.json()["status"], sick.json()["failing"]) == (503, "failing", ["held"])
    assert (served.status_code, well.status_code) == (200, 200)
    assert 'phreg_failed_runs_total{model="held"} 1.0' in metrics
    assert 'phreg_requests_total{route="/artifacts",status="500"} 1.0' in metrics


def test_a_failing_service_recovers_without_requests(held, data):
    """A load balancer sends no image until ``/health/ready`` is 200 again."""
    held.go.set()

    async def run():
        async with opened(held, queue=1, batch=1) as (_, client):

            async def ready():
                return (await client.get("/health/ready")).status_code == 200

            held.error = RuntimeError("the device is gone")
            await client.post("/artifacts", content=data)
            held.go.clear()
            asked = [await ready() for _ in range(9)]
            await until(waiting(client, 0))
            held.go.set()
            for _ in range(20):
                asked.append(await ready())
                await asyncio.sleep(0.01)
            held.error = None
            await until(ready)
            return asked, (await client.get("/metrics")).text

    asked, metrics = asyncio.run(run())
    assert not any(asked), "it said that it is ready while its backend failed"
    assert 'phreg_batch_images_sum{model="held"} 1.0' in metrics, "an image of zeros was run after it worked again"


def test_a_stop_finishes_what_was_accepted_and_refuses_the_rest(held, data):
    async def run():
        async with opened(held) as (app, client):
            asked = asyncio.ensure_future(client.post("/artifacts", content=data))
            await until(lambda: asyncio.to_thread(held.began.is_set))
            app.state.gate.stopping = True
            refused, ready, live = (
                await client.post("/artifacts", content=data),
                await client.get("/health/ready"),
                await client.get("/health/live"),
            )
            held.go.set()
            return refused, ready, live, await asked, app.state.gate

    refused, ready, live, served, gate = asyncio.run(run())
    assert (refused.status_code, refused.headers["retry-after"], refused.headers["connection"]) == (503, "1", "close")
    assert (ready.status_code, ready.json()["status"], live.status_code) == (503, "stopping", 200)
    assert served.status_code == 200
    assert (gate.accepted, gate.active, dict(gate.answers)) == (1, 0, {503: 1, 200: 1})
