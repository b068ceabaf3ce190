"""Bundles with wrong outputs miss a gate, in FP32 and INT8, against their own exam and against PyTorch."""

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.gates import GATES
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import compare_runs, missed_gates
from tests.broken_bundles import BrokenBundle, add_garbage_token, replace_class_token, scale_outputs, shift_features

pytestmark = pytest.mark.usefixtures("torch")
LIMIT = 8
both = pytest.mark.parametrize("which", ["bundle", "int8_bundle"])


@pytest.fixture(params=["bundle", "int8_bundle"])
def broken(world, request):
    return BrokenBundle(getattr(world, request.param), world.tmp / "broken")


def gates_missed(run_cli, folder, *more):
    outcome = run_cli("check", folder, "--backend", "onnxruntime-cpu", "--json", *more)
    assert outcome.code == 3, f"exit code {outcome.code}: a broken bundle passed"
    assert outcome.document["passed"] is False
    assert outcome.document["missed"]
    return {(gate["with"], gate["name"]) for gate in outcome.document["gates"] if not gate["passed"]}


def pictures(folder, photos):
    manifest = Bundle.read(folder).manifest
    return read_photographs(photos, manifest.sizes.default, manifest.preprocess, LIMIT)


@both
def test_the_bundles_themselves_pass_and_list_every_gate(world, which, run_cli):
    folder = getattr(world, which)
    comparison = ("--reference", world.student, "--images", world.photos, "--limit", LIMIT)
    outcome = run_cli("check", folder, "--backend", "onnxruntime-cpu", *comparison, "--json")
    assert outcome.code == 0, outcome.err[-500:]
    assert outcome.document["passed"] is True
    precision = outcome.document["precision"]
    on_photographs = [g for g in outcome.document["gates"] if g["with"] != "own exam"]
    assert {g["name"] for g in on_photographs} == {"bad_values", *GATES[precision]} - {"head_change"}
    assert all({"name", "bar", "figure", "passed"} <= set(gate) for gate in outcome.document["gates"])


def test_scaled_features_with_another_class_token_and_norms_miss_a_gate(broken, run_cli):
    scale_outputs(broken, features=10.0, token_norm=1.4)
    replace_class_token(broken, np.random.default_rng(1).normal(size=broken.width))
    missed = gates_missed(run_cli, broken.save())
    assert {name for _, name in missed} >= {"relative_l2", "cls_cosine", "norm_bias", "norm_difference"}


def test_one_garbage_token_in_every_image_misses_a_gate(broken, run_cli):
    add_garbage_token(broken)
    assert ("own exam", "cosine_min") in gates_missed(run_cli, broken.save())


def test_one_garbage_token_in_one_image_of_eight_misses_a_gate(broken, world, run_cli):
    """The bundle's exam does not contain this image; only the comparison on photographs finds the error."""
    images = pictures(broken.folder, world.photos).batch(0, LIMIT).astype(int)
    alone = np.abs(images[3] - np.delete(images, 3, axis=0)).min(0)
    pixel = tuple(int(i) for i in np.unravel_index(alone.argmax(), alone.shape))
    assert alone[pixel] > 0
    add_garbage_token(broken, pixel, int(images[3][pixel]))
    missed = gates_missed(
        run_cli, broken.save(), "--reference", world.student, "--images", world.photos, "--limit", LIMIT
    )
    assert (f"PyTorch {world.student}", "cosine_min") in missed


def test_the_class_token_of_another_image_misses_a_gate(broken, world, run_cli):
    images = pictures(broken.folder, world.photos)
    with FeatureExtractor.load(broken.folder, "onnxruntime-cpu") as extractor:
        other = extractor.run(images.batch(0, 1))["cls"]
    replace_class_token(broken, other)
    missed = gates_missed(
        run_cli, broken.save(), "--reference", world.student, "--images", world.photos, "--limit", LIMIT
    )
    assert {name for _, name in missed} == {"cls_cosine"}
    assert ("own exam", "cls_cosine") in missed


def test_features_shifted_by_one_patch_miss_a_gate(broken, run_cli):
    shift_features(broken)
    assert ("own exam", "cosine_p1") in gates_missed(run_cli, broken.save())


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_token_norms_off_by_five_percent_miss_a_gate(broken, run_cli, factor):
    scale_outputs(broken, token_norm=factor)
    assert {name for _, name in gates_missed(run_cli, broken.save())} >= {"norm_bias"}


@pytest.mark.parametrize("precision", GATES)
@pytest.mark.parametrize("exam", [True, False])
def test_thirteen_garbage_tokens_of_1369_miss_a_gate(precision, exam):
    """They are fewer than one in a hundred, so the 1st percentile does not change."""
    rng = np.random.default_rng(0)
    true = {"features": rng.normal(size=(1, 37, 37, 64)), "token_norm": rng.uniform(5, 6, (1, 37, 37))}
    got = {name: value.copy() for name, value in true.items()}
    got["features"].reshape(-1, 64)[:13] = rng.normal(size=(13, 64))
    parity = compare_runs(got, true)
    assert parity.cosine_p1 > 0.9999
    assert any("smallest patch cosine" in line for line in missed_gates(parity, precision, exam=exam))


def test_an_eight_bit_check_says_what_it_compares_with(int8_bundle, run_cli):
    outcome = run_cli("check", int8_bundle, "--backend", "onnxruntime-cpu")
    printed = " ".join(outcome.err.split() + outcome.out.split())
    fidelity = Bundle.read(int8_bundle).manifest.quantisation["fidelity"]
    assert "holds the answers of the INT8 graph in ONNX Runtime, not those of FP32" in printed
    assert f"1st percentile {fidelity['cosine_p1']:.5f}" in printed
