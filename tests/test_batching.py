"""Batches across requests: answers, order, sizes, bounds, cancelled images, failures and the end."""

import threading
import time

import numpy as np
import pytest

from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.serving.batching import Batcher, QueueFull, Stopped


class Held:
    """A run that waits until it is let go, and remembers the shapes of its batches."""

    def __init__(self, run):
        self.run, self.go, self.began, self.shapes = run, threading.Event(), threading.Event(), []

    def __call__(self, batch):
        self.shapes.append(batch.shape)
        self.began.set()
        assert self.go.wait(20)
        return self.run(batch)


@pytest.fixture(scope="module")
def extractor(wide_bundle):
    pytest.importorskip("onnxruntime")
    with FeatureExtractor.load(wide_bundle, "onnxruntime-cpu", threads=1) as extractor:
        yield extractor


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)


@pytest.fixture
def opened():
    """Make batchers that are closed at the end of the test."""
    made = []

    def make(run, **options):
        made.append(Batcher(run, **{"most": 4, "wait": 0, "queue": 32, **options}))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def test_images_of_many_threads_get_their_own_features_in_batches(extractor, images, opened):
    held = Held(extractor.dense)
    batcher = opened(held)
    first = batcher.submit(images[0])
    assert held.began.wait(20)
    rest, threads = {}, []
    for number in range(1, 10):
        threads.append(threading.Thread(target=lambda n=number: rest.update({n: batcher.submit(images[n])})))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert (batcher.waiting, batcher.running) == (9, 1)
    held.go.set()
    served = {0: first.result(20), **{number: future.result(20) for number, future in rest.items()}}
    assert [shape[0] for shape in held.shapes] == [1, 4, 4, 1]
    for number, part in served.items():
        alone = extractor.dense(images[number : number + 1])
        assert part.dense.features.shape == (1, 8, 8, 48)
        np.testing.assert_allclose(part.dense.features, alone.features, atol=1e-5)
        np.testing.assert_allclose(part.dense.cls, alone.cls, atol=1e-5)
        assert part.dense.artifact_rate == alone.artifact_rate
        assert part.queued >= 0
        assert part.ran > 0
    assert sorted(part.batch for part in served.values()) == [1, 1] + 8 * [4]


def test_only_images_of_one_size_run_together_and_none_is_overtaken_for_ever(extractor, opened):
    held = Held(extractor.dense)
    batcher = opened(held)
    shapes = [(64, 64), (64, 64), (96, 48), (64, 64), (96, 48), (64, 64), (64, 64), (64, 64)]
    futures = [batcher.submit(np.zeros((*shapes[0], 3), np.uint8))]
    assert held.began.wait(20)
    futures += [batcher.submit(np.zeros((*shape, 3), np.uint8)) for shape in shapes[1:]]
    held.go.set()
    for shape, future in zip(shapes, futures):
        assert future.result(20).dense.features.shape == (1, shape[0] // 8, shape[1] // 8, 48)
    assert held.shapes == [(1, 64, 64, 3), (4, 64, 64, 3), (2, 96, 48, 3), (1, 64, 64, 3)]


def test_an_image_waits_for_others_but_not_longer_than_it_may(extractor, images, opened):
    batcher = opened(extractor.dense, wait=0.2)
    started = time.perf_counter()
    alone = batcher.submit(images[0]).result(20)
    assert 0.2 <= alone.queued <= time.perf_counter() - started
    futures = [batcher.submit(image) for image in images[:4]]  # a full batch waits for nothing
    assert [future.result(20).batch for future in futures] == [4] * 4
    assert futures[0].result().queued < 0.2


def test_images_beyond_the_queue_are_refused_and_cancelled_ones_make_room(extractor, images, opened):
    held = Held(extractor.dense)
    batcher = opened(held, queue=2, most=2)
    running = batcher.submit(images[0])
    assert held.began.wait(20)
    waiting = [batcher.submit(images[1]), batcher.submit(images[2])]
    with pytest.raises(QueueFull, match="2 images wait already"):
        batcher.submit(images[3])
    assert waiting[0].cancel()
    late = batcher.submit(images[3])
    assert not running.cancel(), "an image that runs cannot be cancelled"
    held.go.set()
    assert [future.result(20).batch for future in (running, waiting[1], late)] == [1, 2, 2]
    assert sum(shape[0] for shape in held.shapes) == 3, "the cancelled image was run"


def test_a_failed_run_answers_its_own_requests_alone(extractor, images, opened):
    failing, seen = [True], []

    def run(batch):
        if failing.pop():
            raise RuntimeError("the device is gone")
        return extractor.dense(batch)

    failing.insert(0, False)
    batcher = opened(run, observe=lambda size, seconds: seen.append((size, seconds is not None)))
    with pytest.raises(RuntimeError, match="device is gone"):
        batcher.submit(images[0]).result(20)
    assert batcher.submit(images[0]).result(20).dense.features.shape == (1, 8, 8, 48)
    assert seen == [(1, False), (1, True)]


def test_the_end_answers_what_waits_and_refuses_more(extractor, images):
    held = Held(extractor.dense)
    batcher = Batcher(held, most=4, wait=5, queue=8)
    futures = [batcher.submit(image) for image in images[:3]]
    ending = threading.Thread(target=batcher.close)
    ending.start()
    held.go.set()
    assert [future.result(20).batch for future in futures] == [3] * 3
    ending.join(20)
    assert not ending.is_alive()
    with pytest.raises(Stopped, match="stopping"):
        batcher.submit(images[0])
