"""The TensorRT backend on a fake GPU frees all memory: on closing, after errors, and over thousands of frames."""

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.arrays import DeviceArray
from tests import fake_gpu
from tests.frames import assert_same_outputs, random_frames

FRAMES = 2000


def test_closing_frees_everything(load_engine, device):
    extractor = load_engine("wide_bundle")
    for seed in range(3):
        extractor.run(random_frames(seed))
    extractor.opened.split(extractor.feed(random_frames()))
    assert device.live()
    extractor.close()
    assert device.live() == {}
    extractor.close()


def test_after_closing_every_use_is_refused(load_engine, device):
    extractor = load_engine("bundle")
    backend = extractor.opened
    extractor.close()
    with pytest.raises(PhregError, match="was closed"):
        extractor.run(random_frames())
    for use in (backend.run, backend.split, backend.layers):
        with pytest.raises(PhregError, match="was closed; load the bundle again"):
            use({"image": random_frames()})
    with pytest.raises(PhregError, match="was closed"):
        backend.run_device(DeviceArray(1, (1, 64, 64, 3), np.dtype(np.uint8)), {})


@pytest.mark.parametrize("call", ["run", "split", "layers"])
def test_closing_frees_everything_after_an_inference_that_failed(load_engine, on_cpu, device, tensorrt, call):
    extractor = load_engine("bundle")
    tensorrt.fail_enqueue = 1
    with pytest.raises(PhregError, match="could not start the inference; the device may be out of memory"):
        getattr(extractor.opened, call)({"image": random_frames()})
    assert_same_outputs(extractor.run(random_frames(1)), on_cpu("bundle", random_frames(1)))
    extractor.close()
    assert device.live() == {}


@pytest.mark.parametrize("call", ["cudaStreamCreateWithFlags", "cudaEventCreateWithFlags"])
def test_a_context_whose_creation_fails_leaves_nothing(load_engine, on_cpu, device, call):
    extractor = load_engine("bundle")
    device.fail_call(call)
    with pytest.raises(PhregError, match="out of memory"):
        extractor.run(random_frames())
    assert device.live() == {}
    assert_same_outputs(extractor.run(random_frames()), on_cpu("bundle", random_frames()))


def test_a_context_that_cannot_be_made_leaves_nothing(load_engine, device, tensorrt):
    extractor, tensorrt.contexts = load_engine("bundle"), 0
    with pytest.raises(PhregError, match="no execution context; the GPU has too little memory"):
        extractor.run(random_frames())
    assert device.live() == {}
    extractor.close()


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMallocHost"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_out_of_memory_is_explained_and_the_next_call_succeeds(load_engine, on_cpu, device, call, at):
    extractor = load_engine("wide_bundle")
    device.fail_call(call, at)
    with pytest.raises(PhregError, match=f"out of memory in {call}. Use a smaller batch"):
        extractor.run(random_frames())
    device.failing.clear()
    assert_same_outputs(extractor.run(random_frames(1)), on_cpu("wide_bundle", random_frames(1)))
    extractor.close()
    assert device.live() == {}


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMallocHost"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_context_works_after_its_buffers_could_not_grow(load_engine, on_cpu, device, call, at):
    extractor = load_engine("wide_bundle")
    for seed in range(3):
        extractor.run(random_frames(seed))
    device.fail_call(call, at)
    large = random_frames(4, 4, (96, 96))
    with pytest.raises(PhregError, match="out of memory"):
        extractor.run(large)
    assert_same_outputs(extractor.run(random_frames(1)), on_cpu("wide_bundle", random_frames(1)))
    assert_same_outputs(extractor.run(large), on_cpu("wide_bundle", large))
    extractor.close()
    assert device.live() == {}


def test_a_graph_that_cannot_be_launched_leaves_nothing(load_engine, device):
    extractor = load_engine("bundle")
    extractor.run(random_frames())
    device.fail_call("cudaGraphLaunch", 1, fake_gpu.cudaError_t.cudaErrorLaunchFailure)
    with pytest.raises(PhregError, match=r"cudaGraphLaunch failed with CUDA error 719 \(cudaErrorLaunchFailure\)"):
        extractor.run(random_frames())
    extractor.close()
    assert device.live() == {}


def test_closing_continues_after_an_error_and_raises_it(load_engine, device):
    extractor = load_engine("bundle")
    extractor.run(random_frames())
    before = device.live()
    device.fail_call("cudaFree", 1, fake_gpu.cudaError_t.cudaErrorInvalidValue)
    with pytest.raises(PhregError, match="cudaFree failed"):
        extractor.close()
    assert device.live() == {"allocations": 1}, before
    extractor.close()


def test_thousands_of_frames_take_no_more_memory(load_engine, device):
    extractor = load_engine("bundle")
    image = random_frames()
    for _ in range(3):
        extractor.run(image)
    before, calls = device.live(), device.count()
    device.calls.clear()
    for _ in range(FRAMES):
        extractor.run(image)
        if len(device.calls) > 1000:
            assert not any(
                name.startswith(("cudaMalloc", "cudaEventCreate", "cudaGraphInst")) for name, _ in device.calls
            )
            device.calls.clear()
    assert device.live() == before
    assert calls["cudaMalloc"] == 4
