import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from phreg_deploy.runtime.positions import resample


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (16, 12), (37, 37), (5, 40), (13, 15), (28, 3)])
def test_resampling_equals_timms(grid):
    """Antialiased bicubic, up and down, square and not; measured at most 2e-5 apart in float32."""
    base = np.random.default_rng(0).standard_normal((14, 14, 8)).astype(np.float32)
    expected = resample_abs_pos_embed(
        torch.from_numpy(base).reshape(1, -1, 8), list(grid), [14, 14], num_prefix_tokens=0
    )
    got = resample(base, grid)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), atol=3e-5)


def test_the_native_grid_is_left_alone():
    base = np.random.default_rng(0).standard_normal((4, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(resample(base, (4, 6)), base.reshape(1, 24, 3))
