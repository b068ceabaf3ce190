"""What missed a gate is found by layer, image and patch: features, norms, attention, class tokens and heads."""

import numpy as np
import pytest

from phreg_deploy.pytest_plugin.comparison import Comparison
from phreg_deploy.pytest_plugin.failures import PATCHES, Place
from phreg_deploy.pytest_plugin.patch_errors import KINDS, MEASURES, patch_errors
from phreg_deploy.runtime.parity import SENTENCES, gates_of

IMAGES, ROWS, COLUMNS, WIDTH, HEADS = 3, 4, 6, 16, 2
# The place that each test changes: image, row, column.
AT = (1, 2, 5)


def outputs():
    """All kinds of outputs of three images, of 4 x 6 patches of 2 x 2 labels."""
    rng = np.random.default_rng(5)
    made = {}
    for layer in ("", ".2"):
        made[f"features{layer}"] = rng.normal(size=(IMAGES, ROWS, COLUMNS, WIDTH)).astype(np.float32)
        made[f"token_norm{layer}"] = rng.uniform(9, 11, (IMAGES, ROWS, COLUMNS)).astype(np.float32)
        made[f"cls{layer}"] = rng.normal(size=(IMAGES, WIDTH)).astype(np.float32)
    made["attention"] = rng.uniform(0.01, 0.02, (IMAGES, HEADS, ROWS, COLUMNS)).astype(np.float32)
    made["labels"] = rng.integers(0, 5, (IMAGES, 2 * ROWS, 2 * COLUMNS)).astype(np.uint8)
    made["segmentation.street"] = rng.normal(size=(IMAGES, ROWS, COLUMNS, 3)).astype(np.float32)
    made["depth"] = rng.uniform(1, 9, (IMAGES, ROWS, COLUMNS)).astype(np.float32)
    return made


def at(array):
    """The values at the changed place, as a view."""
    return array[AT] if array.shape[1] == ROWS else array[AT[0], :, AT[1], AT[2]]


def set_feature(made, layer):
    at(made[f"features{layer}"])[:] *= -1


def set_norm(made, layer, factor):
    made[f"token_norm{layer}"][AT] *= factor


def set_labels(made):
    tile = made["labels"][AT[0], 2 * AT[1] : 2 * AT[1] + 2, 2 * AT[2] : 2 * AT[2] + 2]
    tile[:] = (tile + 1) % 5


def set_logits(made):
    at(made["segmentation.street"])[:] *= -1


def set_depth(made):
    made["depth"][AT] *= 2.5


def set_class_token(made):
    made["cls"][AT[0]] *= -1


CASES = {
    "features": (lambda made: set_feature(made, ""), "cosine_min", "", 2.0),
    "features of a layer": (lambda made: set_feature(made, ".2"), "cosine_min", "layer 2: ", 2.0),
    "distance": (lambda made: set_feature(made, ""), "relative_l2", "", 2.0),
    "norms": (lambda made: set_norm(made, "", 1.5), "norm_difference", "", 0.5),
    "norms of a layer": (lambda made: set_norm(made, ".2", 1.5), "norm_difference", "layer 2: ", 0.5),
    "an outlier": (lambda made: set_norm(made, "", 5), "outlier_points", "", 1.0),
    "attention": (lambda made: at(made["attention"])[:].fill(0.9), "relative_l2", "attention: ", None),
    "not finite": (lambda made: at(made["features"])[:3].fill(np.nan), "bad_values", "", 3),
    "labels": (set_labels, "head_change", "", 1.0),
    "logits": (set_logits, "head_change", "", 1.0),
    "a depth": (set_depth, "head_change", "", 1.5),
    "a class token": (set_class_token, "cls_cosine", "", None),
}


def compared(got, expected):
    comparison = Comparison("reference", "another run", None)
    comparison.new_case()
    pixels = np.zeros((IMAGES, 16, 24, 3), np.uint8)
    names = [f"{i}.png" for i in range(IMAGES)]
    comparison.add(names, pixels, got, expected, lambda images, i, reference=False: {})
    return comparison


@pytest.mark.parametrize("name", CASES)
def test_the_changed_patch_is_found(name):
    change, gate, where, value = CASES[name]
    got, expected = outputs(), outputs()
    change(got)
    comparison = compared(got, expected)
    missed = {g.name: g for g in gates_of(comparison.parity, "fp32") if not g.passed}
    assert gate in missed
    miss, found = comparison.miss(missed[gate])
    assert miss.sentence == f"{where}{missed[gate]} (against another run)"
    assert found[0][0].name.startswith(f"{AT[0]}.png")
    assert found[0][2].shape == (ROWS, COLUMNS)
    place = miss.places[0]
    if gate == "cls_cosine":
        assert str(place) == "1.png: class token"
        return
    assert place.image == "1.png"
    assert place.patches[0][:2] == AT[1:]
    if value is not None:
        assert place.patches[0][2] == pytest.approx(value, rel=1e-3)


def test_the_worst_of_two_sizes_is_found():
    sound, turned = outputs(), outputs()
    set_feature(turned, "")
    comparison = compared(outputs(), sound)
    comparison.new_case()
    comparison.add(["a", "b", "c"], np.zeros((3, 16, 24, 3), np.uint8), turned, sound, lambda *_: {})
    (gate,) = [g for g in gates_of(comparison.parity, "fp32") if g.name == "cosine_min"]
    miss, _ = comparison.miss(gate)
    assert miss.places[0].image == "b"
    assert miss.places[0].patches[0][:2] == AT[1:]


def test_equal_outputs_have_no_errors():
    errors = patch_errors(outputs(), outputs(), None)
    assert set(errors) == {"", "2", "attention"}
    assert set(errors[""]) == set(MEASURES)
    for kinds in errors.values():
        for kind, values in kinds.items():
            assert len(values) == IMAGES
            assert np.abs(values).max() < 1e-9, kind


def test_every_gate_has_a_kind_and_every_kind_words():
    assert set(KINDS) == set(SENTENCES)
    assert set(KINDS.values()) == set(MEASURES)


def test_a_place_names_the_worst_patches_and_no_noise():
    errors = np.full((ROWS, COLUMNS), 1e-6)
    errors[3, 1], errors[0, 4] = 0.5, 0.25
    place = Place.of("a.png", "1 - cosine", errors)
    assert place.patches == ((3, 1, 0.5), (0, 4, 0.25))
    assert str(place) == "a.png: 1 - cosine at patch (row, column) (3, 1) 0.5, (0, 4) 0.25, of 4 x 6"
    assert len(Place.of("a.png", "1 - cosine", np.ones((ROWS, COLUMNS))).patches) == PATCHES
    assert Place.of("a.png", "1 - cosine", np.zeros((ROWS, COLUMNS))).patches == ()
