"""Frames in the memory of a strict fake GPU: any address and stream, no wait and no allocation in the steady state."""

import gc
import threading
from collections import Counter

import numpy as np
import pytest

from phreg_deploy.runtime import FeatureExtractor
from tests import fake_gpu
from tests.cli_helpers import ROOT
from tests.frames import assert_same_outputs, create_stream, random_frames, read_now, to_host

# Bytes before frame 1 of a batch at 518 px, modulo 256: 518 * 518 * 3 % 256.
MISALIGNED = 108


def filled(device, value, **how):
    return fake_gpu.Array(device, np.full_like(value, 7), **how)


@pytest.mark.parametrize("own", [False, True])
def test_an_image_and_outputs_may_lie_at_any_address(load_engine, on_cpu, device, own):
    """NvInferRuntime.h on setTensorAddress: "The pointer must have at least 256-byte alignment." """
    extractor, image = load_engine("bundle"), random_frames()
    wanted = on_cpu("bundle", image)
    out = {name: filled(device, value, offset=4) for name, value in wanted.items()}
    stream = create_stream(device) if own else None
    for _ in range(3):
        extractor.run(fake_gpu.Array(device, image, offset=MISALIGNED), out=out, stream=stream)
        device.runtime.cudaDeviceSynchronize()
        assert_same_outputs(read_now(out), wanted)


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_the_default_stream_of_the_caller_is_not_waited_for(load_engine, on_cpu, device, stream):
    """NvInferRuntime.h on enqueueV3: the default stream costs "additional cudaDeviceSynchronize() calls"."""
    extractor, image = load_engine("bundle"), random_frames()
    extractor.run(random_frames(5))
    array = fake_gpu.Array(device, image)
    out = {name: filled(device, value) for name, value in on_cpu("bundle", image).items()}
    device.waits.clear()
    extractor.run(array, out=out, stream=stream)
    assert device.waits == []
    assert all((value.read() == 7).all() for value in out.values()), "no wait has happened yet"
    device.runtime.cudaStreamSynchronize(stream)
    assert_same_outputs(read_now(out), on_cpu("bundle", image))


def calls_of_a_frame(device, run, frames=5):
    """Return how often each function of CUDA is called in one frame of the steady state, and the host's waits."""
    for _ in range(3):
        run()
    device.calls.clear()
    device.waits.clear()
    for _ in range(frames):
        run()
    counts = Counter(name for name, _ in device.calls)
    assert all(count % frames == 0 for count in counts.values()), counts
    assert len(device.waits) % frames == 0
    return {name: count // frames for name, count in counts.items()}, device.waits[: len(device.waits) // frames]


def assert_documented(kind, calls, waits):
    """Assert that the table in docs/tensorrt.md says what was counted: calls, copies, allocations and waits."""
    lines = (ROOT / "docs" / "tensorrt.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {kind} |")]
    copies, allocations = calls.get("cudaMemcpyAsync", "in the graph"), calls.get("cudaMalloc", 0)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        str(number) for number in (sum(calls.values()), copies, allocations, len(waits))
    ]


@pytest.mark.parametrize("name", ["bundle", "wide_bundle"])
def test_a_frame_on_the_host_takes_four_calls_and_one_wait(load_engine, device, name):
    extractor, image = load_engine(name), random_frames()
    calls, waits = calls_of_a_frame(device, lambda: extractor.run(image))
    assert calls == {"cudaGetDevice": 1, "cudaSetDevice": 1, "cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}
    assert waits == ["cudaStreamSynchronize"]
    assert_documented("a frame of the host", calls, waits)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["bundle", "wide_bundle"])
def test_a_frame_on_the_callers_stream_takes_eleven_calls_and_no_wait(load_engine, on_cpu, device, name, given):
    extractor, image, stream = load_engine(name), random_frames(), create_stream(device)
    array = fake_gpu.Array(device, image)
    out = {key: filled(device, value) for key, value in on_cpu(name, image).items()} if given else None
    calls, waits = calls_of_a_frame(device, lambda: extractor.run(array, stream=stream, out=out))
    assert calls == {
        "cudaGetDevice": 1,
        "cudaSetDevice": 1,
        "cudaEventRecord": 2,
        "cudaStreamWaitEvent": 2,
        "cudaGraphLaunch": 1,
        "cudaMemcpyAsync": 4,  # the image, and features, token_norm and cls
    }
    assert waits == []
    assert_documented("a frame on the GPU, with your stream", calls, waits)


def test_a_frame_on_the_device_without_a_stream_waits_once(load_engine, device):
    extractor, array = load_engine("bundle"), fake_gpu.Array(device, random_frames())
    calls, waits = calls_of_a_frame(device, lambda: extractor.run(array))
    assert calls == {
        "cudaGetDevice": 1,
        "cudaSetDevice": 1,
        "cudaGraphLaunch": 1,
        "cudaMemcpyAsync": 4,
        "cudaStreamSynchronize": 1,
    }
    assert waits == ["cudaStreamSynchronize"]
    assert_documented("a frame on the GPU, without a stream", calls, waits)


def test_host_and_device_calls_in_turn_cost_what_each_costs_alone(load_engine, device):
    extractor, image, stream = load_engine("bundle"), random_frames(), create_stream(device)
    array = fake_gpu.Array(device, image)

    def both():
        extractor.run(image)
        extractor.run(array, stream=stream)

    calls, waits = calls_of_a_frame(device, both)
    assert calls["cudaGraphLaunch"] == 2
    assert not {"cudaMalloc", "cudaFree", "cudaStreamBeginCapture"} & set(calls)
    assert waits == ["cudaStreamSynchronize"]


def test_shapes_are_set_once(load_engine, device, monkeypatch):
    extractor, image, seen = load_engine("wide_bundle"), random_frames(), []
    array = fake_gpu.Array(device, image)
    extractor.run(array)
    context = type(extractor.opened._contexts[0]._execution._context)
    for name in ("set_input_shape", "infer_shapes", "get_tensor_shape", "set_tensor_address"):
        monkeypatch.setattr(context, name, lambda *_, name=name: seen.append(name))
    extractor.run(array)
    extractor.run(image)
    assert seen == []


def test_the_memory_of_an_output_is_used_again_after_its_reader(load_engine, on_cpu, device):
    """The reader's stream is the one of the next call, so the next frame waits for the reader."""
    extractor, stream, read = load_engine("bundle"), create_stream(device), []
    arrays = [fake_gpu.Array(device, random_frames(seed)) for seed in range(3)]
    seen = []
    for array in arrays:
        got = extractor.run(array, stream=stream)["features"]
        seen.append(got.pointer)
        size, shape, pointer = got.nbytes, got.shape, got.pointer
        device.queue(
            device.stream_of(stream),
            lambda p=pointer, n=size, s=shape: read.append(
                np.frombuffer(bytes(device.span(p, n)), np.float32).reshape(s)
            ),
        )
        del got
    device.runtime.cudaStreamSynchronize(stream)
    assert len(set(seen)) == 1
    for seed, features in enumerate(read):
        assert_same_outputs({"features": features}, {"features": on_cpu("bundle", random_frames(seed))["features"]})


@pytest.mark.parametrize("reader", [7, "interface"])
def test_memory_that_another_stream_may_still_read_is_not_used_again(load_engine, device, reader):
    extractor, stream = load_engine("bundle"), create_stream(device)
    other, array = create_stream(device), fake_gpu.Array(device, random_frames())
    got = extractor.run(array, stream=stream)
    if reader == "interface":
        assert got["features"].__cuda_array_interface__["data"][0] == got["features"].pointer
    else:
        assert got["features"].__dlpack__(stream=other) is not None
    pointer = got["features"].pointer
    del got
    gc.collect()
    again = extractor.run(array, stream=stream)
    assert again["features"].pointer != pointer


def test_the_reader_of_an_output_that_is_given_back_is_remembered(load_engine, device):
    extractor, stream, other = load_engine("bundle"), create_stream(device), create_stream(device)
    array = fake_gpu.Array(device, random_frames())
    got = extractor.run(array, stream=stream)
    assert got["features"].__dlpack__(stream=other) is not None
    pointer = got["features"].pointer
    extractor.run(array, stream=stream, out=got)
    del got
    gc.collect()
    assert extractor.run(array, stream=stream)["features"].pointer != pointer


def test_outputs_that_are_kept_are_not_overwritten(load_engine, on_cpu, device):
    extractor, stream = load_engine("bundle"), create_stream(device)
    kept = [extractor.run(fake_gpu.Array(device, random_frames(seed)), stream=stream) for seed in range(4)]
    device.runtime.cudaStreamSynchronize(stream)
    for seed, outputs in enumerate(kept):
        assert_same_outputs(to_host(outputs), on_cpu("bundle", random_frames(seed)))


def test_idle_memory_is_bounded(load_engine, device, monkeypatch):
    monkeypatch.setattr("phreg_deploy.runtime.gpu.pool.MOST_IDLE", 40_000)
    extractor = load_engine("wide_bundle")
    for side in (48, 56, 64, 72, 80, 88, 96):
        extractor.run(fake_gpu.Array(device, random_frames(0, 1, (side, side))))
    idle = sum(block.buffer.size for block in extractor.opened._pool._idle)
    assert idle <= 40_000


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("out", [False, True])
def test_closing_waits_for_the_callers_stream(tensorrt, copy_bundle, device, on_cpu, index, out):
    from phreg_deploy.export.engine.build import BuildRequest, build_engine

    device.installed, folder, image = 2, copy_bundle("bundle"), random_frames()
    device.runtime.cudaSetDevice(index)
    build_engine(BuildRequest(folder, check=False, device=index))
    device.runtime.cudaSetDevice(index)
    extractor, stream = FeatureExtractor.load(folder, "tensorrt", device=index), create_stream(device)
    array = fake_gpu.Array(device, image, index=index)
    wanted = on_cpu("bundle", image)
    given = {name: filled(device, value, index=index) for name, value in wanted.items()} if out else None
    got = extractor.run(array, stream=stream, out=given)
    device.runtime.cudaSetDevice(0)
    extractor.close()
    device.runtime.cudaStreamSynchronize(stream)
    assert_same_outputs(read_now(given) if out else to_host(got), wanted)
    del got
    gc.collect()
    device.runtime.cudaStreamDestroy(stream)
    if given is not None:
        for value in given.values():
            value.free()
    array.free()
    assert device.live() == {}


def test_closing_waits_for_a_reader_of_an_output_that_is_gone(load_engine, device):
    extractor, stream = load_engine("bundle"), create_stream(device)
    got = extractor.run(fake_gpu.Array(device, random_frames()), stream=stream)["features"]
    work = fake_gpu.Work(lambda: None, touches=((got.pointer, got.nbytes),))
    device.queue(device.stream_of(stream), work)
    del got
    extractor.close()
    assert not device.in_flight(lambda other: other is work)


@pytest.mark.parametrize("used", [False, True])
def test_the_gpu_that_the_caller_selected_stays_selected(tensorrt, copy_bundle, device, used):
    """Except where this process does not use it yet: selecting it would start it."""
    from phreg_deploy.export.engine.build import BuildRequest, build_engine

    device.installed, folder = 2, copy_bundle("bundle")
    build_engine(BuildRequest(folder, device=1))
    device.chosen.index, device.started = 0, {0, 1} if used else {1}
    with FeatureExtractor.load(folder, "tensorrt", device=1) as extractor:
        extractor.run(random_frames())
        to_host(extractor.run(fake_gpu.Array(device, random_frames(), index=1)))
    assert device.index == (0 if used else 1)
    assert device.started == ({0, 1} if used else {1})


def test_four_threads_with_streams_share_the_pool(load_engine, on_cpu, device, tensorrt):
    extractor, errors = load_engine("bundle"), []
    work = [(fake_gpu.Array(device, random_frames(i)), on_cpu("bundle", random_frames(i))) for i in range(4)]
    streams = [create_stream(device) for _ in work]
    tensorrt.delay, barrier = 0.0003, threading.Barrier(4)

    def serve(i):
        try:
            barrier.wait()
            for _ in range(8):
                got = extractor.run(work[i][0], stream=streams[i])
                assert_same_outputs(to_host(got), work[i][1])
        except BaseException as error:  # a thread's error must fail the test
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
