"""The TensorRT backend on a fake GPU takes and fills the caller's arrays, on the caller's stream."""

from collections import Counter

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.arrays import DeviceArray
from tests import fake_gpu
from tests.frames import assert_same_outputs, create_stream, pointers, random_frames, read_now, to_host


def caller_outputs(device, on_cpu, name, image):
    return {key: fake_gpu.Array(device, np.full_like(value, 7)) for key, value in on_cpu(name, image).items()}


def count_copies(device):
    """Count copies by their kind."""
    return Counter(words[3].name for name, words in device.calls if name == "cudaMemcpyAsync")


def test_an_array_on_the_gpu_does_not_cross_the_bus(load_engine, on_cpu, device):
    extractor, image = load_engine("bundle"), random_frames()
    array = fake_gpu.Array(device, image)
    device.calls.clear()
    got = extractor.run(array)
    assert all(isinstance(value, DeviceArray) for value in got.values())
    assert count_copies(device) == {"cudaMemcpyDeviceToDevice": 4}
    assert_same_outputs(to_host(got), on_cpu("bundle", image))


def test_the_callers_arrays_are_filled(load_engine, on_cpu, device):
    extractor, image = load_engine("wide_bundle"), random_frames(0, 2, (48, 96))
    out = caller_outputs(device, on_cpu, "wide_bundle", image)
    got = extractor.run(fake_gpu.Array(device, image), out=out)
    assert pointers(got) == pointers(out)
    assert_same_outputs(read_now(out), on_cpu("wide_bundle", image))
    assert_same_outputs(to_host(got), on_cpu("wide_bundle", image))


def test_outputs_that_are_not_given_are_allocated(load_engine, on_cpu, device):
    extractor, image = load_engine("bundle"), random_frames()
    given = caller_outputs(device, on_cpu, "bundle", image)["features"]
    got = extractor.run(fake_gpu.Array(device, image), out={"features": given})
    assert_same_outputs(to_host(got), on_cpu("bundle", image))
    assert got["features"].pointer == given.pointer


def test_the_callers_stream_is_used_and_not_waited_for(load_engine, on_cpu, device):
    extractor, image, stream = load_engine("wide_bundle"), random_frames(), create_stream(device)
    extractor.run(random_frames(5))  # this uploads the position embedding
    out = caller_outputs(device, on_cpu, "wide_bundle", image)
    array = fake_gpu.Array(device, image)
    device.calls.clear()
    device.waits.clear()
    extractor.run(array, out=out, stream=stream)
    assert device.waits == []
    assert count_copies(device) == {"cudaMemcpyDeviceToDevice": 4}
    assert all((value.read() == 7).all() for value in out.values()), "no wait has happened yet"
    device.runtime.cudaStreamSynchronize(stream)
    assert_same_outputs(read_now(out), on_cpu("wide_bundle", image))


def test_the_next_call_on_the_host_comes_after_that_on_the_callers_stream(load_engine, on_cpu, device):
    extractor, image, stream = load_engine("bundle"), random_frames(), create_stream(device)
    extractor.run(random_frames(5))
    out = caller_outputs(device, on_cpu, "bundle", image)
    extractor.run(fake_gpu.Array(device, image), out=out, stream=stream)
    assert_same_outputs(extractor.run(random_frames(6)), on_cpu("bundle", random_frames(6)))
    assert_same_outputs(read_now(out), on_cpu("bundle", image))


def test_two_streams_of_the_caller_are_put_in_order(load_engine, on_cpu, device):
    extractor, first, second = load_engine("bundle"), create_stream(device), create_stream(device)
    outs = []
    for seed, stream in enumerate((first, second)):
        outs.append(caller_outputs(device, on_cpu, "bundle", random_frames(seed)))
        extractor.run(fake_gpu.Array(device, random_frames(seed)), out=outs[-1], stream=stream)
    device.runtime.cudaStreamSynchronize(second)
    for seed, out in enumerate(outs):
        assert_same_outputs(read_now(out), on_cpu("bundle", random_frames(seed)))


def test_another_grid_waits_for_the_one_before_on_the_callers_stream(load_engine, on_cpu, device):
    extractor, stream = load_engine("wide_bundle"), create_stream(device)
    work = [(random_frames(i, 1, size), {}) for i, size in enumerate([(48, 96), (96, 48), (64, 64)])]
    for image, out in work:
        out.update(caller_outputs(device, on_cpu, "wide_bundle", image))
        extractor.run(fake_gpu.Array(device, image), out=out, stream=stream)
    device.runtime.cudaStreamSynchronize(stream)
    for image, out in work:
        assert_same_outputs(read_now(out), on_cpu("wide_bundle", image))


class Late(fake_gpu.Array):
    """An array that its library is still filling, on the library's stream."""

    def __init__(self, device, value, stream):
        super().__init__(device, np.zeros_like(value), stream=stream)
        device.queue(device.streams[stream], lambda: self.write(value))


class Lent:
    """The same with DLPack alone, which makes the reader's stream wait for the library's stream."""

    def __init__(self, device, value, stream):
        self.array, self.stream = Late(device, value, stream), stream

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream):
        assert stream not in (None, 0), "DLPack forbids these streams on CUDA"
        device = self.array.device
        if stream != -1:
            mark = device.mark(device.streams[self.stream])
            device.queue(device.stream_of(stream), lambda: device.finish(mark))
        return DeviceArray(self.array.pointer, self.array.shape, self.array.dtype, self.array).__dlpack__()


@pytest.mark.parametrize("kind", [Late, Lent])
@pytest.mark.parametrize("own", [False, True])
def test_an_array_that_is_still_being_filled_is_waited_for(load_engine, on_cpu, device, kind, own):
    extractor, image, producer = load_engine("bundle"), random_frames(), create_stream(device)
    stream = create_stream(device) if own else None
    got = extractor.run(kind(device, image, producer), stream=stream)
    assert_same_outputs(to_host(got), on_cpu("bundle", image))


@pytest.mark.parametrize("kind", [Late, Lent])
def test_stream_0_of_the_caller_is_the_default_stream(load_engine, on_cpu, device, kind):
    extractor, image, producer = load_engine("bundle"), random_frames(), create_stream(device)
    got = extractor.run(kind(device, image, producer), stream=0)
    assert got["features"].__cuda_array_interface__["stream"] == 1, "the interface forbids stream 0"
    assert_same_outputs(to_host(got), on_cpu("bundle", image))


def test_outputs_live_longer_than_the_extractor(load_engine, on_cpu, device):
    extractor, image = load_engine("bundle"), random_frames()
    got = extractor.run(fake_gpu.Array(device, image))
    extractor.close()
    assert_same_outputs(to_host(got), on_cpu("bundle", image))
    assert got["features"].__dlpack__(stream=5) is not None, "its work is done, so there is no stream to wait for"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: fake_gpu.Array(d, random_frames(), strides=(24576, 384, 6, 2)), "expected a contiguous array"),
        (
            lambda d: fake_gpu.Array(d, random_frames().astype(np.float32)),
            r"got float32 \(1, 64, 64, 3\) on the GPU, expected uint8",
        ),
        (lambda d: fake_gpu.Array(d, random_frames()[0]), r"got uint8 \(64, 64, 3\) on the GPU"),
        (lambda d: fake_gpu.Array(d, random_frames(0, 2)), "batch"),
        (lambda d: fake_gpu.Array(d, random_frames(0, 1, (80, 64))), "80x64"),
        (lambda d: random_frames().tolist(), "got list, expected a uint8 RGB array"),
    ],
)
def test_arrays_that_are_no_batch_are_refused(load_engine, device, change, words):
    with pytest.raises(PhregError, match=words):
        load_engine("bundle").run(change(device))


def test_outputs_of_another_kind_are_refused(load_engine, on_cpu, device):
    extractor, image = load_engine("bundle"), random_frames()
    array = fake_gpu.Array(device, image)
    wrong = fake_gpu.Array(device, np.zeros((1, 8, 8, 48), np.float16))
    with pytest.raises(PhregError, match=r"out: got features as float16 .*expected float32"):
        extractor.run(array, out={"features": wrong})
    with pytest.raises(PhregError, match="out: got colours, expected"):
        extractor.run(array, out={"colours": wrong})
    with pytest.raises(PhregError, match="got ndarray, expected an array on a GPU"):
        extractor.run(array, out={"features": np.zeros((1, 8, 8, 48), np.float32)})
    with pytest.raises(PhregError, match="out and stream are for a batch on the GPU"):
        extractor.run(image, stream=5)
    got = extractor.run(array)
    assert_same_outputs(to_host(got), on_cpu("bundle", image))
