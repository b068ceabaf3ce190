"""Closing an extractor on a GPU while other threads are in a call: nothing that they use is freed under them."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.gpu.closing import Calls
from tests import fake_gpu
from tests.frames import assert_same_outputs, random_frames, to_host
from tests.test_gpu_images import noise
from tests.threads import run_in_threads

# Seconds until a thread that does not come back fails the test.
PATIENCE = 20


@contextmanager
def held_at(device, call):
    """Hold the first call of a CUDA function in the block; yields the events "a thread is in it" and "go on"."""
    inside, go_on, real = threading.Event(), threading.Event(), getattr(device.runtime, call)

    def hold(*arguments):
        if not inside.is_set():
            inside.set()
            assert go_on.wait(PATIENCE)
        return real(*arguments)

    setattr(device.runtime, call, hold)
    try:
        yield inside, go_on
    finally:
        go_on.set()
        delattr(device.runtime, call)


def close_during(device, extractor, work, call):
    """Close the extractor while another thread is in ``call`` of ``work``; return what the work gave."""
    given, failed, closed = [], [], threading.Event()

    def serve():
        try:
            given.append(work())
        except BaseException as error:  # it must fail the test
            failed.append(error)

    def close():
        extractor.close()
        closed.set()

    threads = [threading.Thread(target=serve), threading.Thread(target=close)]
    with held_at(device, call) as (inside, go_on):
        threads[0].start()
        assert inside.wait(PATIENCE)
        threads[1].start()
        early = closed.wait(0.2)
        go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert failed == []
    assert not early, "it was closed while a thread was in a call"
    assert closed.is_set()
    return given[0]


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_call_on_the_host_ends_before_the_engine_is_freed(load_engine, on_cpu, device, call):
    extractor, image = load_engine("bundle"), random_frames(1)
    got = close_during(device, extractor, lambda: extractor.run(image), call)
    assert_same_outputs(got, on_cpu("bundle", image))
    assert device.live() == {}


def test_a_replay_ends_before_its_graph_is_freed(load_engine, on_cpu, device):
    extractor, image = load_engine("bundle"), random_frames(1)
    for seed in range(2, 5):
        extractor.run(random_frames(seed))
    got = close_during(device, extractor, lambda: extractor.run(image), "cudaGraphLaunch")
    assert_same_outputs(got, on_cpu("bundle", image))
    assert device.live() == {}


def test_a_call_on_the_gpu_ends_before_the_engine_is_freed(load_engine, on_cpu, device):
    extractor, image = load_engine("bundle"), random_frames(1)
    array = fake_gpu.Array(device, image)
    got = close_during(device, extractor, lambda: extractor.run(array), "cudaMemcpyAsync")
    assert_same_outputs(to_host(got), on_cpu("bundle", image))


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaEventRecord"])
def test_a_frame_that_is_resized_ends_before_the_kernel_is_freed(load_engine, device, call):
    """Its rows are fitted in one stream and inferred in another, so more than one call of CUDA comes after."""
    extractor, image = load_engine("bundle"), noise(120, 200)
    wanted = extractor(image)
    got = close_during(device, extractor, lambda: extractor(fake_gpu.Array(device, image)), call)
    np.testing.assert_allclose(got.features, wanted.features, atol=1e-4)
    assert device.live() == {"allocations": 1}, "the frame"


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_call_of_onnxruntime_ends_before_its_buffers_are_freed(copy_bundle, onnxruntime_gpu, device, call):
    extractor, image = FeatureExtractor.load(copy_bundle("bundle"), "onnxruntime-cuda"), random_frames(1)
    wanted = extractor.run(image)
    assert_same_outputs(close_during(device, extractor, lambda: extractor.run(image), call), wanted)
    assert device.live() == {}


@pytest.mark.parametrize("name", ["bundle", "wide_bundle"])
def test_a_call_of_onnxruntime_on_the_gpu_ends_before_it_is_closed(copy_bundle, onnxruntime_gpu, device, name):
    extractor, image = FeatureExtractor.load(copy_bundle(name), "onnxruntime-cuda"), random_frames(1)
    wanted, array = extractor.run(image), fake_gpu.Array(device, image, stream=1)
    got = close_during(device, extractor, lambda: extractor.run(array), "cudaStreamSynchronize")
    assert_same_outputs(to_host(got), wanted)


def test_threads_get_right_answers_or_are_told_that_it_was_closed(load_engine, on_cpu, device, tensorrt):
    extractor, image, served = load_engine("bundle"), random_frames(1), []
    wanted, tensorrt.delay = on_cpu("bundle", image), 0.0005

    def serve_on():
        while True:
            assert_same_outputs(extractor.run(image), wanted)
            served.append(1)
            if len(served) == 20:
                extractor.close()

    def serve(_):
        with pytest.raises(PhregError, match="was closed; load the bundle again"):
            serve_on()

    assert run_in_threads(serve, range(4)) == []
    assert len(served) >= 20
    assert device.live() == {}


def test_a_call_may_close_what_it_is_in():
    """A signal handler runs in the main thread, between two instructions of a call."""
    calls = Calls()
    with calls.one(), calls.one():
        assert calls.end()
        assert not calls.end()
        another = calls.one()
        with pytest.raises(PhregError, match="was closed"):
            another.__enter__()


def test_a_forked_child_does_not_wait_for_threads_of_its_parent(monkeypatch):
    calls = Calls()
    thread = threading.Thread(target=lambda: calls.one().__enter__())
    thread.start()
    thread.join()
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert calls.end()
    assert not calls.end()
