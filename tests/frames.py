"""Random images and fake GPU streams for tests of backends, and the comparison of their outputs."""

from typing import Any

import numpy as np

from tests.fake_gpu import Device


def random_frames(seed: int = 0, batch: int = 1, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Draw images, uint8 ``(batch, *size, 3)``."""
    return np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


def assert_same_outputs(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Assert that two backends gave the same outputs, in type and to 1e-5."""
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def to_host(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Copy arrays on the GPU to the host, after the work that fills them."""
    return {name: array.numpy() for name, array in arrays.items()}


def read_now(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the present contents of arrays of the fake GPU without a wait."""
    return {name: array.read() for name, array in arrays.items()}


def pointers(arrays: dict[str, Any]) -> dict[str, int]:
    return {name: array.pointer for name, array in arrays.items()}


def create_stream(device: Device) -> int:
    """Create a stream on the fake GPU; return its number."""
    return int(device.runtime.cudaStreamCreateWithFlags(1)[1])
