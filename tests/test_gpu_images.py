"""Frames on a GPU become the model's input with Pillow's own bytes: the CUDA source itself, run on the processor."""

import numpy as np
import pytest
from PIL import Image

import phreg_deploy.runtime.gpu_images.fitter as fitter_module
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.images.fitting import fit_as
from phreg_deploy.images.nv12 import Nv12Frame
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu_images import nvrtc
from phreg_deploy.runtime.gpu_images.coefficients import height_first
from phreg_deploy.runtime.gpu_images.fitter import GpuFitter
from phreg_deploy.spec import Preprocess
from tests import fake_gpu
from tests.fake_gpu.kernels import FakeNvrtc
from tests.frames import create_stream

PATCH = (8, 8)
MEAN = (0.485, 0.456, 0.406)


def steps(interpolation="bicubic", mode="center", share=1.0):
    return Preprocess(MEAN, (0.2, 0.2, 0.2), interpolation, mode, share)


def noise(height, width, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def fitter(device, all_freed):
    """A fitter on the fake GPU; everything must be freed after the test."""
    fitter = GpuFitter(Cuda(0), PATCH)
    given = []
    fitter.lend = lambda *words, **options: given.append(fake_gpu.Array(device, *words, **options)) or given[-1]
    yield fitter
    fitter.close()
    for array in given:
        array.free()


def fit(fitter, frames, size=(64, 64), preprocess=None, name=None, bgr=False, stream=None):
    return fitter.fit(fitter.read(frames, stream), size, preprocess or steps(), name, bgr, stream)


def assert_equal_to_host(fitter, image, size=(64, 64), preprocess=None, name=None, bgr=False):
    preprocess = preprocess or steps()
    wanted = fit_as(image, size, preprocess, PATCH, name, bgr)
    got = fit(fitter, [fitter.lend(image)], size, preprocess, name, bgr)
    np.testing.assert_array_equal(got.images.numpy()[0], wanted.image, err_msg=f"{image.shape} {preprocess} {name}")
    assert (got.mask is None) == (wanted.mask is None)
    if wanted.mask is not None:
        np.testing.assert_array_equal(got.mask[0], wanted.mask)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("name", [None, "pad", "crop", "squash"])
def test_the_bytes_are_those_of_pillow(fitter, interpolation, name):
    random = np.random.default_rng(len(interpolation) + len(name or ""))
    for seed in range(12):
        height, width = (int(side) for side in np.exp(random.uniform(np.log(16), np.log(600), 2)))
        size = tuple(8 * int(side) for side in random.integers(2, 16, 2))
        preprocess = steps(interpolation, ("center", "squash")[seed % 2], (1.0, 0.9, 0.875)[seed % 3])
        assert_equal_to_host(fitter, noise(height, width, seed), size, preprocess, name, bgr=seed % 4 == 3)


@pytest.mark.parametrize("size", [(224, 224), (518, 518)])
def test_a_frame_of_4k_has_the_bytes_of_pillow(fitter, size):
    assert_equal_to_host(fitter, noise(2160, 3840), size)


@pytest.mark.parametrize("height", [179, 180, 181, 182, 400])
def test_the_two_passes_come_in_pillows_order(fitter, height):
    """Pillow 13 resizes the height first where it loses more than twice what the width does; here that is 116."""
    image = noise(height, 122)
    assert height_first((122, height), (64, 64)) == (height >= 181 and int(Image.__version__.split(".")[0]) >= 13)
    assert_equal_to_host(fitter, image, (64, 64), steps(mode="squash"))


def test_an_image_of_the_inputs_size_is_unchanged(fitter):
    image = noise(64, 64)
    np.testing.assert_array_equal(fit(fitter, [fitter.lend(image)]).images.numpy()[0], image)


def test_a_crop_beyond_the_image_is_black_as_pillows(fitter):
    for size in ((64, 64), (48, 96)):
        assert_equal_to_host(fitter, noise(100, 150), size, steps(mode="squash", share=1.25))


def test_rows_may_have_a_pitch_and_pixels_a_step(fitter):
    wide = noise(50, 80, channels=4)
    pitch = 80 * 4
    bgrx = fitter.lend(wide[:, :70, :3])
    bgrx._start, kept = bgrx._start, fitter.lend(wide)
    bgrx.pointer, bgrx.strides = kept.pointer, (pitch, 4, 1)
    wanted = fit_as(np.ascontiguousarray(wide[:, :70, :3]), (64, 64), steps(), PATCH, None, True)
    np.testing.assert_array_equal(fit(fitter, [bgrx], bgr=True).images.numpy()[0], wanted.image)


def test_frames_of_several_sizes_and_batches_are_fitted_together(fitter):
    images = [noise(90, 120, 1), noise(70, 40, 2), noise(90, 120, 3), noise(90, 120, 4)]
    batch = fitter.lend(np.stack(images[2:]))
    got = fit(fitter, [fitter.lend(images[0]), fitter.lend(images[1]), batch], name="pad")
    for i, image in enumerate(images):
        wanted = fit_as(image, (64, 64), steps(), PATCH, "pad")
        np.testing.assert_array_equal(got.images.numpy()[i], wanted.image)
        np.testing.assert_array_equal(got.mask[i], wanted.mask)


@pytest.mark.parametrize("matrix", ["bt601", "bt709", None])
@pytest.mark.parametrize("limited", [True, False])
def test_nv12_has_the_bytes_of_the_host(fitter, matrix, limited):
    y, uv = noise(98, 130, 1, 1)[..., 0], noise(49, 65, 2, 2)
    host = Nv12Frame(y, uv, matrix, limited)
    wanted = fit_as(host.rgb(), (64, 64), steps(), PATCH, "pad")
    frame = Nv12Frame(fitter.lend(y), fitter.lend(uv), matrix, limited)
    # The order of channels does not matter to a frame that knows its own.
    for bgr in (False, True):
        np.testing.assert_array_equal(fit(fitter, [frame], name="pad", bgr=bgr).images.numpy()[0], wanted.image)


@pytest.mark.parametrize("flat", [False, True])
def test_planes_of_nv12_may_have_a_pitch(fitter, flat):
    y, uv = noise(40, 64, 1, 1)[..., 0], noise(20, 32, 2, 2)
    planes = fitter.lend(y[:, :50]), fitter.lend(uv[:, :25].reshape(20, 50) if flat else uv[:, :25])
    for plane, whole in zip(planes, (y, uv)):
        plane.pointer = fitter.lend(whole).pointer
        plane.strides = (64, 1) if len(plane.shape) == 2 else (64, 2, 1)
    wanted = fit_as(Nv12Frame(y[:, :50], uv[:, :25]).rgb(), (64, 64), steps(), PATCH)
    np.testing.assert_array_equal(fit(fitter, [Nv12Frame(*planes)]).images.numpy()[0], wanted.image)


def test_a_frame_costs_two_launches_and_nothing_else(fitter, device):
    stream, frames = create_stream(device), [fitter.lend(noise(90, 120, i)) for i in range(4)]
    for frame in frames[:2]:  # the images of the frame before are still held
        got = fit(fitter, [frame], stream=stream)
    device.runtime.cudaStreamSynchronize(stream)
    device.calls.clear()
    device.waits.clear()
    for frame in frames:
        got = fit(fitter, [frame], stream=stream)
    counted = device.count()
    del counted["cudaGetDevice"], counted["cudaSetDevice"]
    assert counted == {"cuLaunchKernel": 8}
    assert device.waits == []
    device.runtime.cudaStreamSynchronize(stream)
    np.testing.assert_array_equal(got.images.numpy()[0], fit_as(noise(90, 120, 3), (64, 64), steps(), PATCH).image)
    del got
    device.runtime.cudaStreamDestroy(stream)


def test_a_frame_that_is_still_being_filled_is_waited_for(fitter, device):
    image, producer = noise(90, 120), create_stream(device)
    for stream in (None, create_stream(device)):
        late = fitter.lend(np.zeros_like(image), stream=producer)
        device.queue(device.streams[producer], lambda late=late: late.write(image))
        got = fit(fitter, [late], stream=stream).images.numpy()[0]
        np.testing.assert_array_equal(got, fit_as(image, (64, 64), steps(), PATCH).image)
    for stream in [*device.streams]:
        if stream != fitter._stream.handle:
            device.runtime.cudaStreamDestroy(stream)


def test_streams_do_not_share_memory_in_flight(fitter, device):
    streams = [create_stream(device) for _ in range(3)]
    images = [noise(90, 120, i) for i in range(9)]
    got = [fit(fitter, [fitter.lend(image)], stream=streams[i % 3]) for i, image in enumerate(images)]
    for stream in streams:
        device.runtime.cudaStreamSynchronize(stream)
    for image, fitted in zip(images, got):
        wanted = fit_as(image, (64, 64), steps(), PATCH).image
        np.testing.assert_array_equal(fitted.images.numpy()[0], wanted)
    for stream in streams:
        device.runtime.cudaStreamDestroy(stream)


def test_weights_that_are_dropped_stay_until_their_frames_are_done(device, monkeypatch):
    monkeypatch.setattr(fitter_module, "MOST_GEOMETRIES", 1)
    fitter, stream = GpuFitter(Cuda(0), PATCH), create_stream(device)
    images = [noise(60 + i, 120) for i in range(5)]
    got = [fit(fitter, [fake_gpu.Array(device, image)], stream=stream) for image in images]
    device.runtime.cudaStreamSynchronize(stream)
    for image, fitted in zip(images, got):
        np.testing.assert_array_equal(fitted.images.numpy()[0], fit_as(image, (64, 64), steps(), PATCH).image)
    fitter.close()


def test_closing_waits_for_frames_in_flight(device):
    fitter, stream = GpuFitter(Cuda(0), PATCH), create_stream(device)
    got = fit(fitter, [fake_gpu.Array(device, noise(90, 120))], stream=stream)
    fitter.close()
    np.testing.assert_array_equal(got.images.numpy()[0], fit_as(noise(90, 120), (64, 64), steps(), PATCH).image)


REFUSED = {
    "floats": (lambda d: fake_gpu.Array(d, np.zeros((8, 8, 3), np.float32)), r"got float32 \(8, 8, 3\) on the GPU"),
    "four channels": (lambda d: fake_gpu.Array(d, noise(8, 8, channels=4)), r"Drop alpha: array\[\.\.\., :3\]"),
    "grey": (lambda d: fake_gpu.Array(d, noise(8, 8)[..., 0]), r"got uint8 \(8, 8\) on the GPU, expected uint8 \(H, W"),
    "no pixel": (lambda d: fake_gpu.Array(d, noise(0, 8)), "holds no pixel"),
    "channels apart": (lambda d: fake_gpu.Array(d, noise(8, 8), strides=(8, 1, 64)), r"with strides \(8, 1, 64\)"),
    "rows that overlap": (lambda d: fake_gpu.Array(d, noise(8, 8), strides=(12, 3, 1)), "at least 24 bytes"),
    "odd NV12": (lambda d: Nv12Frame(*(fake_gpu.Array(d, noise(7, 8, 0, n)) for n in (1, 2))), "even height and width"),
    "no chroma": (lambda d: Nv12Frame(*[fake_gpu.Array(d, noise(8, 8, 0, 1))] * 2), r"expected uv as \(4, 4, 2\)"),
    "P010": (lambda d: Nv12Frame(*[fake_gpu.Array(d, noise(8, 8).astype(np.uint16))] * 2), "10-bit video"),
    "luma apart": (
        lambda d: Nv12Frame(
            fake_gpu.Array(d, noise(8, 8)[..., 0], strides=(8, 2)), fake_gpu.Array(d, noise(4, 4, 0, 2))
        ),
        "expected contiguous rows",
    ),
    "a thread": (lambda d: fake_gpu.Array(d, noise(3000, 1)), "too long and narrow"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_frame_is_refused(device, kind):
    make, words = REFUSED[kind]
    fitter = GpuFitter(Cuda(0), PATCH)
    with pytest.raises(PhregError, match=words):
        fit(fitter, [make(device)], (16, 16))
    fitter.close()


def test_an_array_of_another_gpu_is_refused(device):
    class Elsewhere(fake_gpu.Array):
        def __dlpack_device__(self):
            return 2, 1

        def __dlpack__(self, stream):
            from phreg_deploy.runtime.gpu.arrays import DeviceArray

            return DeviceArray(self.pointer, self.shape, self.dtype, self, device=(2, 1)).__dlpack__()

    with pytest.raises(PhregError, match=r"on GPU 1, but the extractor runs on GPU 0. Load it with device=1"):
        GpuFitter(Cuda(0), PATCH).read([Elsewhere(device, noise(8, 8))])


def test_a_launch_that_fails_leaves_nothing_in_flight(fitter, device):
    array, stream = fitter.lend(noise(90, 120)), create_stream(device)
    fit(fitter, [array], stream=stream)
    device.fail_call("cuLaunchKernel", 2)
    with pytest.raises(PhregError, match="out of memory in cuLaunchKernel"):
        fit(fitter, [array], stream=stream)
    assert not device.streams[stream].queue
    assert_equal_to_host(fitter, noise(90, 120))
    device.runtime.cudaStreamDestroy(stream)


def test_without_nvrtc_the_extra_is_named(device, monkeypatch):
    def missing():
        raise BackendMissing(f"NVRTC: it cannot be loaded. {nvrtc.EXTRA}")

    monkeypatch.setattr(nvrtc, "_load", missing)
    with pytest.raises(BackendMissing, match=r"phreg-deploy\[gpu-images\]"):
        GpuFitter(Cuda(0), PATCH).read([fake_gpu.Array(device, noise(8, 8))])


def test_a_driver_older_than_nvrtc_is_named(device, monkeypatch):
    monkeypatch.setattr(device, "driver", 12060)
    device.fail_call("cuModuleLoadData", code=fake_gpu.cudaError_t.cudaErrorNoKernelImageForDevice)
    with pytest.raises(PhregError, match=r'driver is of CUDA 12.6.*"cuda-toolkit\[nvrtc\]<13"'):
        GpuFitter(Cuda(0), PATCH).read([fake_gpu.Array(device, noise(8, 8))])


def test_source_that_does_not_compile_is_quoted(device, monkeypatch):
    monkeypatch.setattr(nvrtc, "_load", lambda: FakeNvrtc(device, failing=True))
    with pytest.raises(PhregError, match=r"cannot compile resample.cu for --gpu-architecture=sm_89: an error"):
        GpuFitter(Cuda(0), PATCH).read([fake_gpu.Array(device, noise(8, 8))])
