"""Bundles that were damaged at random, with correct hashes, are refused, harmless or caught by ``check``."""

from collections import Counter

import numpy as np
import pytest

from tests.mutants import Mutator, answers, verdict

pytestmark = pytest.mark.usefixtures("torch")

COUNTS = {"bundle": 90, "wide_bundle": 30, "alone": 30}


# Weights that are not finite make numpy warn.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("which", COUNTS)
def test_no_mutant_is_served_wrongly_or_ends_in_a_traceback(request, tmp_path, which):
    folder = request.getfixturevalue(which)
    expected, mutator, outcomes = answers(folder), Mutator(folder, tmp_path / "mutant"), Counter()
    assert verdict(folder, expected) == "harmless"
    assert all(np.isfinite(value).all() for value in expected.values())
    for seed in range(COUNTS[which]):
        mutant, change = mutator.make(seed)
        try:
            outcome = verdict(mutant, expected)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {change}") from error
        assert not outcome.startswith("silent"), f"seed {seed}: {change}: {outcome}"
        outcomes[outcome] += 1
    assert min(outcomes["refused"], outcomes["caught by check"]) > 5, outcomes
