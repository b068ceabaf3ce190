"""Frames of any size on a real GPU; skipped, with the reason, on other machines."""

import numpy as np
import pytest

from phreg_deploy.images.fitting import fit_as
from phreg_deploy.runtime import FeatureExtractor, Nv12Frame
from phreg_deploy.runtime.gpu_images.fitter import GpuFitter
from phreg_deploy.spec import Preprocess
from tests.test_gpu_images import MEAN, PATCH, noise

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("name", [None, "pad", "crop", "squash"])
def test_the_bytes_are_those_of_pillow(gpu, torch_cuda, interpolation, name):
    steps = Preprocess(MEAN, (0.2, 0.2, 0.2), interpolation, "center", 0.9)
    with GpuFitter(gpu, PATCH) as fitter:
        for seed, (height, width) in enumerate([(2160, 3840), (1080, 1920), (480, 640), (33, 57), (600, 40)]):
            image = noise(height, width, seed)
            frames = fitter.read([torch_cuda.from_numpy(image).cuda()])
            got = fitter.fit(frames, (224, 224), steps, name).images.numpy()[0]
            np.testing.assert_array_equal(got, fit_as(image, (224, 224), steps, PATCH, name).image)


def test_nv12_and_bgrx_have_the_bytes_of_the_host(gpu, torch_cuda):
    steps = Preprocess(MEAN, (0.2, 0.2, 0.2), "bicubic", "center", 1.0)
    host, bgrx = Nv12Frame.of(noise(1620, 1920, 1, 1)[..., 0]), noise(1080, 1920, 2, 4)
    planes = [torch_cuda.from_numpy(plane).cuda() for plane in (host.y, host.uv)]
    with GpuFitter(gpu, PATCH) as fitter:
        got = fitter.fit(fitter.read([Nv12Frame(*planes)]), (224, 224), steps).images.numpy()[0]
        np.testing.assert_array_equal(got, fit_as(host.rgb(), (224, 224), steps, PATCH).image)
        frames = fitter.read([torch_cuda.from_numpy(bgrx).cuda()[..., :3]])
        got = fitter.fit(frames, (224, 224), steps, None, True).images.numpy()[0]
        np.testing.assert_array_equal(got, fit_as(bgrx[..., :3].copy(), (224, 224), steps, PATCH, None, True).image)


def test_an_extractor_serves_them_on_the_callers_stream(engine_of, torch_cuda):
    torch, image = torch_cuda, noise(1080, 1920)
    with FeatureExtractor.load(engine_of("fp16"), "tensorrt", fast=False) as extractor:
        wanted, frame = extractor(image), torch.from_numpy(image).cuda()
        np.testing.assert_allclose(extractor(frame).features, wanted.features, atol=0.02)
        stream = torch.cuda.Stream()
        fitted = extractor.fitted_on_gpu(frame, stream=stream.cuda_stream)
        outputs = extractor.run(fitted.images, stream=stream.cuda_stream)
        stream.synchronize()
        np.testing.assert_allclose(outputs["features"].numpy(), wanted.features, atol=0.02)
