"""Scores of a student are computed in batches, equal those of all features at once, and may fail without harm."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from phreg_deploy.artifacts.measures import agreement, cosine, norm_outliers, outlier_mask
from phreg_deploy.images.photographs import read_photographs
from phreg_deploy.images.views import most_views
from phreg_deploy.progress import SILENT

pytestmark = pytest.mark.usefixtures("torch")


@pytest.fixture(scope="module")
def case(base, student, photos):
    """Base model, student and 24 photographs."""
    from phreg_deploy.models.loading import load_model, model_preprocess

    model = load_model(str(base))
    preprocess = model_preprocess(model, "center")
    return model, load_model(str(student)), read_photographs(photos, (64, 64), preprocess), preprocess


def scored(case, **more):
    from phreg_deploy.distill.evaluation import score_student

    return score_student(*case, device="cpu", progress=SILENT, **more)


def test_streamed_scores_are_those_of_all_features_at_once(case):
    from phreg_deploy.distill.evaluation import REFERENCE_SEED, REFERENCE_VIEWS
    from phreg_deploy.distill.teacher import Teacher
    from phreg_deploy.models.answers import block_norms, read_features

    base, student, photographs, preprocess = case
    report = scored(case).to_json()
    teacher = Teacher(base, preprocess, views=REFERENCE_VIEWS, seed=REFERENCE_SEED)
    target = np.stack([t.patches for t in teacher.targets(photographs)]).reshape(len(photographs), 64, -1)
    features = {
        "base": read_features(base, photographs, preprocess),
        "student": read_features(student, photographs, preprocess),
    }
    median = float(np.median(features["base"]["norms"]))
    outliers = outlier_mask(features["base"]["norms"], median)
    assert outliers.any()
    for name, model in (("base", base), ("student", student)):
        fidelity = agreement(features[name]["patches"], target, outliers)
        assert report[name] == {
            "norm_outliers": asdict(norm_outliers(features[name]["norms"], median)),
            "fidelity": {"mean": fidelity.mean, "p1": fidelity.p1, "outliers": fidelity.chosen},
            "blocks": block_norms(model, photographs, preprocess),
        }
    assert report["class_cosine"] == float(cosine(features["student"]["cls"], features["base"]["cls"]).mean())
    assert report["top1_agreement"] == np.mean(
        features["student"]["logits"].argmax(1) == features["base"]["logits"].argmax(1)
    )
    assert report["images"] == report["out_of"] == 24
    assert report["views"] == most_views((8, 8)) == 18  # of the 20 that a larger grid gets


def test_scores_hold_the_features_of_a_few_images_at_a_time(case, monkeypatch):
    from phreg_deploy.distill import evaluation
    from phreg_deploy.distill.teacher import Teacher

    real, targets, sizes, ahead = evaluation.read_features, Teacher.targets, [], []

    def watched(model, photographs, *more):
        sizes.append(len(photographs))
        ahead.append(len(drawn) - sum(sizes[::2]))
        return real(model, photographs, *more)

    drawn = []

    def drawing(self, *more):
        for target in targets(self, *more):
            drawn.append(1)
            yield target

    monkeypatch.setattr(evaluation, "read_features", watched)
    monkeypatch.setattr(Teacher, "targets", drawing)
    scored(case)
    assert sizes == [16, 16, 8, 8]
    assert max(ahead) <= 0


def test_more_photographs_than_are_scored_are_thinned_out_evenly(case, monkeypatch):
    from phreg_deploy.distill import evaluation

    monkeypatch.setattr(evaluation, "SCORED", 8)
    report = scored(case)
    assert (report.images, report.out_of, report.most) == (8, 24, 8)
    every_third = replace(case[2].subset(range(0, 24, 3)))
    assert scored((*case[:2], every_third, case[3])).student == report.student


@pytest.mark.parametrize(
    "failure", [RuntimeError("CUDA out of memory"), MemoryError("no room"), OSError(5, "I/O error")]
)
def test_a_student_that_cannot_be_scored_is_written_all_the_same(world, run_cli, monkeypatch, failure):
    from phreg_deploy.distill import distillation

    def broken(*arguments, **more):
        assert (world.out / "model.safetensors").is_file()
        raise failure

    words = ["distill", world.base, "--images", world.photos, "-o", world.out, "--epochs", "0", "--views", "2"]
    words += ["--precision", "fp32", "--quiet", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "score_student", broken)
        done = run_cli(*words)
    assert done.code == 0
    assert done.document["scores"] == {"missing": f"{type(failure).__name__}: {failure}"}
    assert f"has no scores ({type(failure).__name__}" in done.err
    assert f"phreg-deploy artifacts {world.out} --images {world.photos}" in done.err
    inspected = run_cli("inspect", world.out, "--json")
    assert inspected.document["record"]["scores"] == done.document["scores"]
    scored = run_cli("artifacts", world.out, "--images", world.photos, "--limit", "2", "--json")
    assert scored.document["images"] == 2
    again = run_cli(*words, "--resume")
    assert (again.code, again.err) == (0, "")
    assert "missing" not in again.document["scores"]


def test_an_interrupt_while_scoring_leaves_a_whole_student(world, run_cli, monkeypatch):
    from phreg_deploy.distill import distillation
    from tests.cli_helpers import leftovers

    def stopped(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "score_student", stopped)
    words = ["distill", world.base, "--images", world.photos, "-o", world.out, "--epochs", "0", "--views", "2"]
    done = run_cli(*words, "--precision", "fp32")
    assert done.code == 130
    assert "only its scores are missing" in " ".join(done.err.split())
    assert leftovers(world.tmp) == ["out.partial"]
    exported = run_cli("export", world.out, "-o", world.tmp / "bundle", "--no-check", "--json")
    assert exported.document["manifest"]["norm_median"] is None
