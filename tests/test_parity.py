"""Parity figures that are collected batch by batch, and their gates."""

import numpy as np
import pytest

from phreg_deploy.artifacts.parity import NEIGHBOURS
from phreg_deploy.bundle.gates import AT_LEAST, GATES, SENTENCES, exam_bars
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.parity import (
    Parity,
    ParityAccumulator,
    compare_runs,
    gates_of,
    missed_gates,
    worst,
)

PASSES = Parity(1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0)


def random_outputs(seed, batch=5, grid=(6, 7), noise=0.0, cls=True):
    """Outputs of a model, and with ``noise`` of one that is nearly the same."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    found = {"features": rng.normal(size=(batch, *grid, 16)), "token_norm": rng.uniform(1, 9, (batch, *grid))}
    if cls:
        found["cls"] = rng.normal(size=(batch, 16))
    return {name: (v + noise * other.normal(size=v.shape)).astype(np.float32) for name, v in found.items()}


def slice_outputs(outputs, start, stop):
    return {name: value[start:stop] for name, value in outputs.items()}


def gather(pairs, median=None):
    tally = ParityAccumulator(median)
    for got, expected in pairs:
        tally.add(got, expected)
    return tally.parity()


@pytest.mark.parametrize("median", [None, 4.0])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("ends", [(1, 2, 3, 4, 5), (2, 5)])
def test_batch_by_batch_is_the_same_as_at_once(median, cls, ends):
    got, expected = random_outputs(0, noise=0.3, cls=cls), random_outputs(0, cls=cls)
    once = compare_runs(got, expected, median)
    parts = gather(
        [(slice_outputs(got, a, b), slice_outputs(expected, a, b)) for a, b in zip((0, *ends), ends)], median
    )
    assert (once.cls_cosine is None) == (parts.cls_cosine is None) == (not cls)
    figures = [{k: v for k, v in parity.to_json().items() if v is not None} for parity in (parts, once)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-12)
    assert once.cosine_min <= once.cosine_p1 < once.cosine_mean < 1
    assert 0 < once.neighbours < 1


def test_a_run_agrees_with_itself():
    same = compare_runs(random_outputs(1), random_outputs(1))
    assert same.to_json() == pytest.approx(PASSES.to_json(), abs=1e-7)
    assert missed_gates(same, "fp32") == []


def test_images_of_several_sizes_count_together():
    small, large = (
        (random_outputs(2, 1, (3, 4)), random_outputs(2, 1, (3, 4), 0.1)),
        (random_outputs(3, 2, (8, 5)), random_outputs(3, 2, (8, 5), 0.1)),
    )
    parity = gather([small, large], 4.0)
    cosines = [compare_runs(*pair, 4.0).cosine_mean for pair in (small, large)]
    assert parity.cosine_mean == pytest.approx(np.average(cosines, weights=[12, 80]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["features", "cls", "token_norm"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_value_in_one_batch_misses_the_gates(value, tensor, place):
    pairs = [(random_outputs(i), random_outputs(i)) for i in range(3)]
    pairs[place][0][tensor].reshape(-1)[3] = value
    parity = gather(pairs)
    assert parity.bad_values == 1
    missed = missed_gates(parity, "int8", cosine_p1=0.0, outlier_points=100.0)
    assert missed[0] == "1 NaN or infinite values, expected none"
    assert parity.cosine_p1 == 0.0


def test_a_run_without_figures_passes_no_gate():
    assert missed_gates(ParityAccumulator().parity(), "int8") != []


def test_shapes_that_differ_are_refused():
    with pytest.raises(PhregError, match=r"got features of shape \(5, 6, 7, 16\), expected \(4, 6, 7, 16\)"):
        compare_runs(random_outputs(0), random_outputs(0, batch=4))


def images_with_hard_ones(seed, images):
    """Features of images whose error differs from one to the next, and the exact ones."""
    rng, exact = np.random.default_rng(seed), random_outputs(seed, batch=images)
    noise = np.exp(0.3 * rng.normal(size=(images, 1, 1, 1))) * rng.normal(size=exact["features"].shape)
    return {**exact, "features": (exact["features"] + 0.2 * noise).astype(np.float32)}, exact


def test_the_lower_bound_of_the_percentile_holds_on_other_images():
    """The plain one is missed by other images half the time, which a choice made on few images must not be."""
    truth = gather([images_with_hard_ones(10_000, 2000)]).cosine_p1
    lower, plain = [], []
    for seed in range(60):
        tally = ParityAccumulator()
        tally.add(*images_with_hard_ones(seed, 32))
        lower.append(tally.lower_p1() <= truth)
        plain.append(tally.parity().cosine_p1 <= truth)
    assert np.mean(lower) >= 0.7
    assert np.mean(plain) <= 0.55


def test_the_lower_bound_is_the_worst_layers_and_0_with_bad_values():
    got, exact = images_with_hard_ones(0, 16)
    tally = ParityAccumulator()
    layers = {"features.3": got["features"], "token_norm.3": got["token_norm"]}
    wanted = {"features.3": exact["features"], "token_norm.3": exact["token_norm"]}
    tally.add({**exact, **layers}, {**exact, **wanted})
    alone = ParityAccumulator()
    alone.add(got, exact)
    assert tally.lower_p1() == alone.lower_p1() < alone.parity().cosine_p1
    broken = {**got, "features": np.full_like(got["features"], np.nan)}
    alone.add(broken, exact)
    assert alone.lower_p1() == 0


def test_neighbours_are_looked_for_among_a_sample_of_large_grids():
    grid = (4, NEIGHBOURS)
    parity = compare_runs(random_outputs(0, 1, grid), random_outputs(0, 1, grid))
    assert parity.neighbours == 1.0


@pytest.mark.parametrize("exam", [False, True])
@pytest.mark.parametrize("precision", GATES)
def test_each_precision_has_its_gates(precision, exam):
    """Each bar is a separate gate: a figure beyond it gives one sentence, a figure at it none."""
    bars = exam_bars(precision) if exam else GATES[precision]
    assert missed_gates(PASSES, precision, exam=exam) == []
    for name, bar in bars.items():
        worse = bar - 1e-6 if name in AT_LEAST else bar + 1e-6
        (missed,) = missed_gates(Parity(**{**PASSES.to_json(), name: worse}), precision, exam=exam)
        assert missed == SENTENCES[name].format(figure=worse, bar=bar)
        assert missed_gates(Parity(**{**PASSES.to_json(), name: bar}), precision, exam=exam) == []


@pytest.mark.parametrize("precision", GATES)
def test_every_figure_that_can_break_is_gated(precision):
    wanted = {"cosine_p1", "cosine_min", "cls_cosine", "relative_l2", "norm_bias", "norm_difference", "outlier_points"}
    assert wanted <= set(GATES[precision])
    assert wanted <= set(exam_bars(precision))
    assert wanted <= set(exam_bars(precision, again=True))


def test_the_exam_of_eight_bits_has_its_own_bar_and_no_neighbours():
    low = Parity(**{**PASSES.to_json(), "cosine_p1": 0.975, "neighbours": 0.2})
    assert len(missed_gates(low, "int8")) == 2
    assert missed_gates(low, "int8", exam=True) == []
    assert len(missed_gates(low, "fp32", exam=True)) == 1, "between runtimes, float is held to the same bar"
    assert len(missed_gates(low, "int8", cosine_p1=0.98, exam=True)) == 1, "a user's own gate is the gate"
    assert len(missed_gates(low, "int8", exam=True, again=True)) == 1, (
        "the runtime that wrote the answers is held to more"
    )
    assert missed_gates(low, "fp32", exam=True, again=True) == missed_gates(low, "fp32", exam=True)


def test_a_model_without_class_token_has_no_gate_on_it():
    without = Parity(**{**PASSES.to_json(), "cls_cosine": None})
    assert missed_gates(without, "fp32") == []
    assert "cls_cosine" not in {gate.name for gate in gates_of(without, "fp32")}


def test_a_missing_output_is_an_error():
    got = random_outputs(0)
    del got["cls"]
    with pytest.raises(PhregError, match="got no cls, which the reference has"):
        compare_runs(got, random_outputs(0))


def test_the_worst_of_several_has_the_weakest_figure_of_each_kind():
    a = Parity(0.9, 0.8, 0.7, 0.1, 3.0, 0.5, 0.0, 0.2, 0.3, None, 0)
    b = Parity(0.8, 0.9, 0.6, 0.2, 2.0, 0.6, 0.1, 0.1, 0.1, 0.4, 0)
    assert worst([a, b]) == Parity(0.8, 0.8, 0.6, 0.2, 3.0, 0.5, 0.1, 0.2, 0.3, 0.4, 0)
    assert worst([a]).cls_cosine is None
