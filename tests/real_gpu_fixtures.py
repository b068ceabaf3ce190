"""Fixtures for tests on a real GPU; each skips with the reason where there is none."""

from pathlib import Path

import numpy as np
import pytest

from phreg_deploy.errors import BackendMissing
from tests.cli_helpers import invoke

# Bytes by which free memory may change: other processes and the driver's pools use it too.
MEMORY_TOLERANCE = 8 << 20


@pytest.fixture(scope="session")
def gpu():
    """The GPU as the runtime opens it."""
    from phreg_deploy.runtime.gpu.cuda import Cuda

    try:
        return Cuda()
    except BackendMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def trt(gpu):
    """The module ``tensorrt``."""
    from phreg_deploy.runtime.gpu.trt_library import load_tensorrt

    try:
        return load_tensorrt()
    except BackendMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def torch_cuda(gpu, torch):
    """PyTorch with CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA, or finds no GPU")
    return torch


@pytest.fixture(scope="session")
def engine_of(tmp_path_factory, student, bundle, photos, trt, gpu):
    """``engine_of("fp16")`` and ``engine_of("fp16", "wide")`` write a bundle and build its engine, once a session.

    ``engine_of.report(precision, sizes)`` is the JSON document of the build.
    """
    from phreg_deploy.calibration import calibrate
    from phreg_deploy.export.exporter import ExportRequest, export_bundle

    root, outcomes = tmp_path_factory.mktemp("on-gpu"), {}

    def make(precision, sizes="fixed") -> Path:
        if precision == "bf16" and gpu.gpu.architecture < 80:
            pytest.skip(f"{gpu.gpu.name} has no bfloat16")
        if precision == "fp8" and gpu.gpu.architecture < 89:
            pytest.skip(f"{gpu.gpu.name} has no FP8")
        target = root / f"{precision}-{sizes}"
        if (precision, sizes) not in outcomes:
            if precision in ("int8", "fp8"):
                calibrate(bundle, photos, target, mode=precision, target="trt")
            else:
                shape = {"image_size": "48:64:96", "batch": "1:2:4"} if sizes == "wide" else {}
                export_bundle(ExportRequest(str(student), precision=precision, **shape), target)
            outcomes[precision, sizes] = invoke("build", target, "--json")
        outcome = outcomes[precision, sizes]
        assert outcome.code == 0, outcome.err
        return target

    make.report = lambda precision, sizes="fixed": outcomes[precision, sizes].document
    return make


def assert_close(got, expected):
    """Assert that outputs differ by at most 2 % in norm, which allows for other precisions."""
    for name in expected:
        a, b = np.asarray(got[name], np.float64), np.asarray(expected[name], np.float64)
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b), name


def assert_memory_stays_flat(call, gpu, calls):
    """Assert that ``calls`` calls after 50 others leave as much free memory as there was before."""
    for _ in range(50):
        call()
    before = gpu.free_memory()[0]
    for _ in range(calls):
        call()
    assert abs(gpu.free_memory()[0] - before) <= MEMORY_TOLERANCE
