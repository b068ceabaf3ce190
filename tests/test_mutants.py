"""Bundles that were damaged at random, with the right hashes: refused, harmless or caught by ``check``, and never a traceback."""

from collections import Counter

import numpy as np
import pytest

from tests.mutants import Mutator, answers, verdict

pytestmark = pytest.mark.usefixtures("torch")

COUNTS = {"bundle": 90, "wide_bundle": 30}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # figures of weights that are not finite
@pytest.mark.parametrize("which", COUNTS)
def test_no_mutant_is_served_wrongly_or_ends_in_a_traceback(request, tmp_path, which):
    folder = request.getfixturevalue(which)
    expected, mutator, seen = answers(folder), Mutator(folder, tmp_path / "mutant"), Counter()
    assert verdict(folder, expected) == "harmless"
    assert np.isfinite(expected["features"]).all()
    for seed in range(COUNTS[which]):
        mutant, done = mutator.make(seed)
        try:
            said = verdict(mutant, expected)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {done}") from error
        assert not said.startswith("silent"), f"seed {seed}: {done}: {said}"
        seen[said] += 1
    assert min(seen["refused"], seen["caught by check"]) > 5, seen
