import numpy as np
import pytest

from phreg_deploy.artifacts.measures import agreement, cosine, norm_outliers, outlier_mask, shift_incoherence
from phreg_deploy.runtime.parity import compare_runs, missed_gates, worst


def test_norm_outliers_are_counted_on_both_sides_of_the_bases_median():
    norms = np.array([[1.0, 1.0, 1.0, 1.0, 1.0, 1.9, 2.1, 0.6, 0.4, 30.0]])
    found = norm_outliers(norms)
    assert found.median == 1.0
    assert found.upper == pytest.approx(0.2)
    assert found.lower == pytest.approx(0.1)
    assert found.rate == pytest.approx(0.3)
    assert found.largest == 30.0
    assert norm_outliers(norms, median=16.0).rate == pytest.approx(0.9)  # all but the 30
    assert outlier_mask(norms, 1.0).sum() == 3


def test_cosine_of_a_zero_vector_is_zero():
    assert cosine(np.zeros(3), np.ones(3)) == 0


def test_agreement_reports_the_chosen_tokens_apart():
    a, b = np.tile([1.0, 0.0], (100, 1)), np.tile([1.0, 0.0], (100, 1))
    b[:2] = [0.0, 1.0]
    chosen = np.zeros(100, bool)
    chosen[:4] = True
    found = agreement(a, b, chosen)
    assert found.mean == pytest.approx(0.98)
    assert found.minimum == 0
    assert found.chosen == pytest.approx(0.5)
    assert agreement(a, b).chosen is None


def test_a_map_that_moves_with_the_image_is_coherent_and_a_fixed_one_is_not():
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((2, 4, 4, 8))
    valid = np.full((2, 4, 4), 5)
    centre = np.zeros(8)
    assert shift_incoherence(plain, 5 * plain, valid, centre).rate == 0
    broken = 5 * plain
    broken[:, 0, 0] *= -1
    found = shift_incoherence(plain, broken, valid, centre)
    assert found.rate == pytest.approx(1 / 16)
    assert found.p99 == pytest.approx(2)
    valid[:, 0, 0] = 3  # too few views: left out
    assert shift_incoherence(plain, broken, valid, centre).rate == 0


def make_outputs(seed=0):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((2, 4, 4, 16)).astype(np.float32)
    return {
        "features": features,
        "token_norm": 5 + rng.random((2, 4, 4)).astype(np.float32),
        "cls": rng.standard_normal((2, 16)),
    }


def test_a_run_agrees_with_itself():
    parity = compare_runs(make_outputs(), make_outputs())
    assert parity.cosine_min == pytest.approx(1)
    assert parity.relative_l2 == 0
    assert parity.neighbours == 1
    assert missed_gates(parity, "fp32") == []


def test_one_wrong_patch_in_thirty_two_fails_the_gate():
    got = make_outputs()
    got["features"] = got["features"].copy()
    got["features"][0, 0, 0] *= -1
    missed = missed_gates(compare_runs(got, make_outputs()), "fp16")
    assert "1st-percentile patch cosine" in missed[0]
    assert "smallest patch cosine" in missed[1]


def test_a_new_outlier_fails_the_gate():
    got = make_outputs()
    got["token_norm"] = got["token_norm"].copy()
    got["token_norm"][0, 0, 0] = 100
    parity = compare_runs(got, make_outputs())
    assert parity.outlier_points == pytest.approx(100 / 32)
    missed = missed_gates(parity, "fp32")
    assert [line.split(" ")[0] for line in missed] == ["a", "norm-outlier"], "the token's norm, and the rate"
    assert missed_gates(parity, "fp32", outlier_points=5) == missed[:1]


def test_nan_misses_the_gate_and_raises_nothing():
    got = make_outputs()
    got["features"] = got["features"].copy()
    got["features"][0, 0, 0, 0] = np.nan
    assert "NaN" in missed_gates(compare_runs(got, make_outputs()), "int8")[0]


def test_the_worst_report_has_the_weakest_figure_of_each_kind():
    good, bad = compare_runs(make_outputs(), make_outputs()), compare_runs(make_outputs(), make_outputs(1))
    assert worst([good, bad]).cosine_p1 == bad.cosine_p1
    assert worst([good, bad]).relative_l2 == bad.relative_l2
