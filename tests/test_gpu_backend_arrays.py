"""ONNX Runtime on a GPU takes and returns arrays in GPU memory, and stages those of the host."""

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests import fake_gpu
from tests.frames import assert_same_outputs, create_stream, pointers, random_frames, read_now, to_host
from tests.threads import run_in_threads


@pytest.fixture
def on_cuda(copy_bundle, onnxruntime_gpu):
    return FeatureExtractor.load(copy_bundle("wide_bundle"), "onnxruntime-cuda")


@pytest.mark.parametrize(("batch", "size"), [(1, (64, 64)), (3, (48, 96))])
def test_an_array_on_the_gpu_is_bound_where_it_lies(on_cuda, onnxruntime_gpu, device, batch, size):
    image = random_frames(0, batch, size)
    array = fake_gpu.Array(device, image)
    got = on_cuda.run(array)
    binding = onnxruntime_gpu.sessions[0].bindings[-1]
    assert binding.inputs["image"][2] == array.pointer
    assert binding.waited
    assert_same_outputs(to_host(got), on_cuda.run(image))
    assert onnxruntime_gpu.sessions[0].bindings == [binding], "an array on the host is not bound"


def test_the_callers_outputs_are_written(on_cuda, device):
    image = random_frames()
    wanted = on_cuda.run(image)
    out = {name: fake_gpu.Array(device, np.zeros_like(value)) for name, value in wanted.items()}
    got = on_cuda.run(fake_gpu.Array(device, image), out=out)
    assert_same_outputs(read_now(out), wanted)
    assert pointers(got) == pointers(out)
    assert_same_outputs(to_host(got), wanted)


@pytest.mark.parametrize("value", [np.zeros((1, 8, 8, 48), np.float16), np.zeros((2, 8, 8, 48), np.float32)])
def test_outputs_of_another_kind_are_refused(on_cuda, device, value):
    with pytest.raises(PhregError, match=r"out: got features as .*, expected float32 \(1, 8, 8, 48\)"):
        on_cuda.run(fake_gpu.Array(device, random_frames()), out={"features": fake_gpu.Array(device, value)})


def test_an_array_that_is_still_being_filled_is_waited_for(on_cuda, device):
    stream, image = create_stream(device), random_frames()
    array = fake_gpu.Array(device, np.zeros_like(image), stream=stream)
    device.queue(device.streams[stream], lambda: array.write(image))
    assert_same_outputs({name: value.numpy() for name, value in on_cuda.run(array).items()}, on_cuda.run(image))


def test_an_output_that_is_still_being_read_is_waited_for(on_cuda, device):
    stream, image = create_stream(device), random_frames()
    wanted = on_cuda.run(image)
    memory, read = fake_gpu.Array(device, np.full_like(wanted["features"], 5), stream=stream), []
    device.queue(device.streams[stream], lambda: read.append(memory.read()))
    on_cuda.run(fake_gpu.Array(device, image), out={"features": memory})
    assert (read[0] == 5).all()


def test_a_stream_of_the_callers_is_refused(on_cuda, device):
    with pytest.raises(PhregError, match="runs on a stream of its own; use tensorrt"):
        on_cuda.run(fake_gpu.Array(device, random_frames()), stream=7)


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino"])
def test_backends_of_the_processor_read_the_host_alone(bundle, device, name):
    pytest.importorskip(name.split("-")[0])
    with FeatureExtractor.load(bundle, name) as extractor:
        with pytest.raises(PhregError, match="host memory only"):
            extractor.run(fake_gpu.Array(device, random_frames()))


def test_staged_outputs_equal_those_of_the_processor(copy_bundle, onnxruntime_gpu, device):
    with FeatureExtractor.load(copy_bundle("bundle"), "onnxruntime-cuda") as extractor:
        session = onnxruntime_gpu.sessions[0]
        for seed in range(4):
            image = random_frames(seed)
            wanted = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"image": image})))
            assert_same_outputs(extractor.run(image), wanted)
            on_gpu = extractor.run(fake_gpu.Array(device, image))
            assert_same_outputs(to_host(on_gpu), wanted)


def test_threads_take_turns_on_the_staging_buffers(copy_bundle, onnxruntime_gpu):
    with FeatureExtractor.load(copy_bundle("bundle"), "onnxruntime-cuda") as extractor:
        work = [random_frames(seed) for seed in range(6)]
        wanted = [extractor.run(image) for image in work]

        def serve(i):
            for _ in range(10):
                assert_same_outputs(extractor.run(work[i]), wanted[i])

        assert run_in_threads(serve, range(6)) == []


def test_closing_frees_the_staging_buffers(copy_bundle, onnxruntime_gpu, device):
    extractor = FeatureExtractor.load(copy_bundle("bundle"), "onnxruntime-cuda")
    extractor.run(random_frames())
    assert device.live()
    extractor.close()
    assert device.live() == {}


@pytest.mark.parametrize(
    ("call", "at"), [("cudaStreamCreateWithFlags", 1), ("cudaMalloc", 1), ("cudaMalloc", 4), ("cudaMallocHost", 2)]
)
def test_staging_buffers_that_do_not_fit_leave_nothing(copy_bundle, onnxruntime_gpu, device, call, at):
    device.fail_call(call, at)
    with pytest.raises(PhregError, match=f"out of memory in {call}"):
        FeatureExtractor.load(copy_bundle("bundle"), "onnxruntime-cuda")
    assert device.live() == {}
