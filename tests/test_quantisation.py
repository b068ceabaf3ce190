"""The grids of inputs and weights in 8 bits, which ``calibrate`` and INT8-aware distillation share."""

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.quantisation import HEADROOM, LEAST, Grid, Range, Smoothing, make_grid, quantise_weight

PLAIN = Smoothing(norm=None, value=None, hidden=None)


def random_ranges(seed=0, channels=16):
    """Draw ranges that are off centre and of very different widths."""
    rng = np.random.default_rng(seed)
    middle, half = rng.normal(0, 3, channels), np.exp(rng.normal(0, 2, channels))
    return Range((middle - half).astype(np.float32), (middle + half).astype(np.float32))


def in_steps(grid: Grid, x: np.ndarray) -> np.ndarray:
    """``(C,)`` values as multiples of the step, on the grid's own axes."""
    return (x.astype(np.float64) - grid.centre) / grid.smooth / grid.step


def fills_grid(low, high) -> bool:
    """Return whether no observed value is clipped and at most a fifth of the grid is unused."""
    return 127 / 1.25 < np.abs([low, high]).max() <= 127.001


@pytest.mark.parametrize("smoothing", [Smoothing(), PLAIN, Smoothing(0.0, 0.0, 0.0), Smoothing(1.0, 1.0, 1.0)])
def test_the_output_of_a_norm_is_centred_and_symmetric(smoothing):
    observed = random_ranges()
    grid = make_grid(observed, "norm", smoothing)
    assert grid.symmetric
    assert grid.zero == 128
    np.testing.assert_allclose(grid.centre, (observed.low + observed.high) / 2, rtol=1e-6)
    low, high = in_steps(grid, observed.low), in_steps(grid, observed.high)
    np.testing.assert_allclose(low, -high, rtol=1e-4, atol=1e-3)
    assert fills_grid(low, high)


def test_values_are_centred_only_if_their_scale_can_be_folded():
    observed = random_ranges(1)
    assert np.any(make_grid(observed, "value", Smoothing()).centre != 0)
    grid = make_grid(observed, "value", PLAIN)
    assert not grid.centre.any()
    assert (grid.smooth == 1).all()
    assert grid.symmetric
    assert fills_grid(in_steps(grid, observed.low), in_steps(grid, observed.high))


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_hidden_units_keep_zero_as_a_grid_point(alpha, seed):
    observed = Range(
        np.full(8, -0.17, np.float32), np.exp(np.random.default_rng(seed).normal(0, 2, 8)).astype(np.float32)
    )
    grid = make_grid(observed, "hidden", Smoothing(hidden=alpha))
    assert not grid.centre.any()
    assert isinstance(grid.zero, int)
    assert 0 <= grid.zero <= 255
    low, high = in_steps(grid, observed.low) + grid.zero, in_steps(grid, observed.high) + grid.zero
    assert low.min() >= -0.501, "the zero point was rounded by half a step at most"
    assert high.max() <= 255.501
    assert max(high.max() - low.min(), 0) == pytest.approx(255, abs=1e-3)


@pytest.mark.parametrize(("low", "high", "zero"), [(0.5, 2.0, 0), (-2.0, -0.5, 255), (0.0, 1.0, 0)])
def test_zero_is_on_the_grid_where_hidden_units_never_reach_it(low, high, zero):
    grid = make_grid(Range(np.full(3, low, np.float32), np.full(3, high, np.float32)), "hidden", PLAIN)
    assert grid.zero == zero
    assert grid.step == pytest.approx(max(abs(low), abs(high)) / 255)


@pytest.mark.parametrize("kind", ["norm", "value", "hidden"])
@pytest.mark.parametrize("alpha", [None, 0.8, 1.0])
def test_dead_channels_divide_nothing_by_zero(kind, alpha):
    observed = random_ranges(2)
    observed.low[:4] = observed.high[:4] = 0
    observed.low[4] = observed.high[4] = 7.5  # a constant: nothing is left of it once it is centred
    grid = make_grid(observed, kind, Smoothing(alpha, alpha, alpha))
    assert np.isfinite(grid.smooth).all()
    assert (grid.smooth > 0).all()
    assert grid.step > 0
    assert np.isfinite(in_steps(grid, observed.high)).all()
    dead = make_grid(Range(np.zeros(4, np.float32), np.zeros(4, np.float32)), kind, Smoothing(alpha, alpha, alpha))
    assert dead.step > 0
    assert dead.step <= LEAST
    np.testing.assert_allclose(dead.smooth, 1)


@pytest.mark.parametrize("kind", ["norm", "value", "hidden"])
def test_smoothing_evens_out_channels_and_changes_no_overall_scale(kind):
    observed = random_ranges(3)
    size = np.maximum(np.abs(observed.low), np.abs(observed.high))
    floored = size < HEADROOM * np.median(size) if kind == "hidden" else np.zeros(len(size), bool)
    assert floored.any() == (kind == "hidden"), "hidden units with small observed values get headroom"
    widths = []
    for alpha in (0.0, 0.5, 1.0):
        grid = make_grid(observed, kind, Smoothing(alpha, alpha, alpha))
        assert np.log(grid.smooth).mean() == pytest.approx(0, abs=1e-5)
        reach = np.maximum(np.abs(in_steps(grid, observed.low)), np.abs(in_steps(grid, observed.high)))
        widths.append(reach[~floored].max() / reach[~floored].min())
        assert (reach[floored] < reach[~floored].min() * (1 + 1e-6)).all() or alpha < 1
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] == pytest.approx(1, rel=1e-3), "alpha 1 gives every other channel the same range"


def test_ranges_join_channel_by_channel():
    a = Range(np.array([-1, 0, 2], np.float32), np.array([1, 5, 3], np.float32))
    b = Range(np.array([-3, 1, 1], np.float32), np.array([0, 9, 2], np.float32))
    joined = a.join(b)
    np.testing.assert_array_equal(joined.low, [-3, 0, 1])
    np.testing.assert_array_equal(joined.high, [1, 9, 3])


def test_weights_fill_their_bits_and_never_leave_them():
    weight = np.random.default_rng(0).normal(0, 1, (40, 24)).astype(np.float32) * np.logspace(
        -6, 3, 24, dtype=np.float32
    )
    values, steps = quantise_weight(weight)
    assert (values.dtype, steps.dtype, steps.shape) == (np.int8, np.float32, (24,))
    assert np.abs(values.astype(int)).max(axis=0).tolist() == [127] * 24, "-128 is never used, 127 in every column"
    assert (np.abs(values * steps - weight) <= 0.5001 * steps).all()


def test_a_column_of_zeros_stays_zero():
    weight = np.random.default_rng(0).normal(0, 1, (8, 3)).astype(np.float32)
    weight[:, 1] = 0
    values, steps = quantise_weight(weight)
    assert not values[:, 1].any()
    assert steps[1] > 0
    assert np.isfinite(values * steps).all()


@pytest.mark.parametrize("name", ["norm", "value", "hidden"])
@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan"), float("inf")])
def test_an_exponent_out_of_range_is_refused_by_name(name, alpha):
    with pytest.raises(PhregError, match=rf"smoothing: got {name} {alpha}, expected a number from 0 to 1, or none"):
        Smoothing(**{name: alpha})


def test_smoothing_is_stored_and_read_back():
    for setting in (Smoothing(), PLAIN, Smoothing(0.65, 0.95, None, registers=False)):
        assert Smoothing.from_json(setting.to_json()) == setting
    with pytest.raises(PhregError):
        Smoothing.from_json({**Smoothing().to_json(), "hidden": 2.0})
