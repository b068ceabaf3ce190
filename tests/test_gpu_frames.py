"""An extractor takes frames of any size that lie on its GPU; nothing of a frame crosses the bus."""

from collections import Counter

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.images.nv12 import Nv12Frame
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.stream import Stream
from tests import fake_gpu
from tests.frames import assert_same_outputs, create_stream, random_frames, to_host
from tests.test_gpu_images import noise


@pytest.fixture
def on_processor(request):
    """``on_processor(name, image, ...)`` serves an image on the processor, from the host's memory."""
    opened = {}

    def serve(name, *words, **options):
        if name not in opened:
            opened[name] = FeatureExtractor.load(
                request.getfixturevalue(name), "onnxruntime-cpu", threads=1, fast=False
            )
        return opened[name](*words, **options)

    return serve


def assert_same_features(got, wanted):
    np.testing.assert_allclose(got.features, wanted.features, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.token_norm, wanted.token_norm, rtol=1e-5, atol=1e-5)
    assert (got.mask is None) == (wanted.mask is None)
    if wanted.mask is not None:
        np.testing.assert_array_equal(got.mask, wanted.mask)


@pytest.mark.parametrize("options", [{}, {"color": "bgr"}, {"fit": "pad"}, {"fit": "crop"}, {"fit": "squash"}])
def test_a_frame_on_the_gpu_has_the_features_of_one_on_the_host(load_engine, on_processor, device, options):
    extractor, image = load_engine("bundle"), noise(120, 200)
    got = extractor(fake_gpu.Array(device, image), **options)
    assert_same_features(got, on_processor("bundle", image, **options))


def test_frames_of_several_sizes_are_served_in_the_batches_of_the_bundle(load_engine, on_processor, device):
    extractor = load_engine("listed_bundle")
    images = [noise(120, 200, 1), noise(99, 50, 2), noise(120, 200, 3)]
    on_gpu = [
        fake_gpu.Array(device, images[0]),
        fake_gpu.Array(device, images[1]),
        fake_gpu.Array(device, images[2][None]),
    ]
    got = extractor(on_gpu, (48, 96), fit="pad")
    wanted = on_processor("listed_bundle", images, (48, 96), fit="pad")
    np.testing.assert_allclose(got.features, wanted.features, atol=0.02)  # the engine computes in FP16
    np.testing.assert_array_equal(got.mask, wanted.mask)


def test_one_frame_fills_the_smallest_batch(load_engine, on_processor, device):
    extractor, image = load_engine("bundle"), noise(120, 200)
    extractor.manifest.batches.check(1)
    assert extractor(fake_gpu.Array(device, image[None])).features.shape[0] == 1


def test_a_frame_costs_two_launches_one_wait_and_no_allocation(load_engine, device):
    extractor, frame = load_engine("wide_bundle"), fake_gpu.Array(device, noise(480, 640))
    for _ in range(3):
        extractor(frame)
    device.calls.clear()
    device.waits.clear()
    for _ in range(10):
        extractor(frame)
    assert device.waits == ["cudaStreamSynchronize"] * 10
    counted = device.count()
    assert counted["cuLaunchKernel"] == 20
    assert not [name for name in counted if "Malloc" in name or "Free" in name or "Create" in name], counted
    kinds = Counter(words[3].name for name, words in device.calls if name == "cudaMemcpyAsync")
    assert kinds == {"cudaMemcpyDeviceToDevice": 10, "cudaMemcpyDeviceToHost": 10 * len(extractor.manifest.outputs)}


def test_fitted_frames_are_run_on_the_callers_stream_without_a_wait(load_engine, on_processor, device):
    extractor, image, stream = load_engine("bundle"), noise(480, 640), create_stream(device)
    frame = fake_gpu.Array(device, image)
    for _ in range(3):
        outputs = extractor.run(extractor.fitted_on_gpu(frame, stream=stream).images, stream=stream)
    device.calls.clear()
    device.waits.clear()
    outputs = extractor.run(extractor.fitted_on_gpu(frame, stream=stream).images, stream=stream)
    assert device.waits == []
    counted = device.count()
    assert not [name for name in counted if "Malloc" in name or "Create" in name], counted
    wanted = on_processor("bundle", image)
    np.testing.assert_allclose(outputs["features"].numpy(), wanted.features, rtol=1e-5, atol=1e-5)


def test_fitted_frames_live_until_another_stream_has_read_them(load_engine, on_processor, device):
    extractor, images = load_engine("bundle"), [noise(120, 200, i) for i in range(6)]
    first, second = create_stream(device), create_stream(device)
    outputs = []
    for image in images:
        fitted = extractor.fitted_on_gpu(fake_gpu.Array(device, image), stream=first)
        outputs.append(extractor.run(fitted.images, stream=second))
    for image, got in zip(images, outputs):
        wanted = on_processor("bundle", image)
        np.testing.assert_allclose(to_host(got)["features"], wanted.features, rtol=1e-5, atol=1e-5)


def test_without_a_stream_the_frame_was_read_on_return(load_engine, device):
    extractor, image = load_engine("bundle"), noise(120, 200)
    frame = fake_gpu.Array(device, image)
    fitted = extractor.fitted_on_gpu(frame, fit="pad")
    frame.write(np.zeros_like(image))
    host = extractor.fitted(image, fit="pad")
    np.testing.assert_array_equal(fitted.images.numpy()[0], host.image)
    np.testing.assert_array_equal(fitted.mask[0], host.mask)


def test_preparing_copies_the_input_alone_to_the_host(load_engine, device):
    extractor, image = load_engine("bundle"), noise(1080, 1920)
    extractor.preprocess = FeatureExtractor.load(extractor.bundle.folder, "onnxruntime-cpu", fast=False).preprocess
    frame = fake_gpu.Array(device, image)
    extractor.prepare(frame)
    device.calls.clear()
    np.testing.assert_array_equal(extractor.prepare(frame), extractor.prepare(image))
    assert [words[2] for name, words in device.calls if name == "cudaMemcpyAsync"] == [64 * 64 * 3]
    with pytest.raises(PhregError, match="prepare: got 2 images, expected one"):
        extractor.prepare(fake_gpu.Array(device, np.stack([image[:99], image[:99]])))


def test_a_stream_serves_frames_on_the_gpu(load_engine, on_processor, device):
    images = [noise(120, 200, i) for i in range(3)]
    frames = (fake_gpu.Array(device, image) for image in images)
    with Stream(load_engine("bundle"), frames, every_frame=True) as stream:
        results = list(stream)
    assert len(results) == 3
    for image, result in zip(images, results):
        assert_same_features(result.dense, on_processor("bundle", image))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_nv12_is_served(load_engine, on_processor, device, on_gpu):
    extractor = load_engine("bundle")
    frame = Nv12Frame.of(noise(180, 160, 1, 1)[..., 0])
    wanted = on_processor("bundle", frame.rgb())
    given = Nv12Frame(fake_gpu.Array(device, frame.y), fake_gpu.Array(device, frame.uv)) if on_gpu else frame
    assert_same_features(extractor(given), wanted)
    assert_same_features(extractor(given, color="bgr"), wanted)


def test_onnxruntime_on_the_gpu_takes_frames_too(copy_bundle, onnxruntime_gpu, device):
    extractor, image = FeatureExtractor.load(copy_bundle("wide_bundle"), "onnxruntime-cuda"), noise(120, 200)
    assert_same_features(extractor(fake_gpu.Array(device, image)), extractor(image))


def test_a_backend_on_the_processor_refuses_frames_on_a_gpu(bundle, device):
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1) as extractor:
        for call in (extractor, extractor.prepare, extractor.fitted_on_gpu):
            with pytest.raises(PhregError, match="onnxruntime-cpu reads host memory only; got Array on a GPU"):
                call(fake_gpu.Array(device, noise(120, 200)))


def test_what_is_no_frame_on_the_gpu_is_refused(load_engine, device):
    extractor, image = load_engine("bundle"), noise(120, 200)
    frame = fake_gpu.Array(device, image)
    with pytest.raises(PhregError, match=r"1 images on a GPU and 1 on the host \(ndarray\), expected all on the GPU"):
        extractor([frame, image])
    with pytest.raises(PhregError, match="0 images on a GPU and 1 on the host"):
        extractor.fitted_on_gpu(image)
    with pytest.raises(PhregError, match="fit: got 'stretch'"):
        extractor(frame, fit="stretch")
    with pytest.raises(PhregError, match="60x60"):
        extractor(frame, (60, 60))
    with pytest.raises(PhregError, match="Call the extractor itself with it, or copy it to the host"):
        extractor.tiled(frame)
    assert device.count("nvrtcCreateProgram") == 0, "nothing is compiled for a wrong call"


def test_closing_frees_everything_but_images_that_are_held(load_engine, device):
    extractor, frame = load_engine("bundle"), fake_gpu.Array(device, noise(120, 200))
    extractor(frame)
    fitted = extractor.fitted_on_gpu(frame)
    extractor.close()
    assert device.live() == {"allocations": 2}, "the frame and its fitted image"
    assert fitted.images.numpy().shape == (1, 64, 64, 3)
    del fitted
    frame.free()
    assert device.live() == {}


def test_batches_at_the_inputs_size_are_as_before(load_engine, on_cpu, device):
    extractor, image = load_engine("bundle"), random_frames()
    assert_same_outputs(to_host(extractor.run(fake_gpu.Array(device, image))), on_cpu("bundle", image))
