"""Bad options are refused before PyTorch is imported: the commands run in a process that cannot import it."""

import pytest

from phreg_deploy import arguments
from tests.cli_helpers import leftovers, without

pytestmark = pytest.mark.usefixtures("torch")
BLOCKED = ["torch", "timm", "safetensors", "onnx", "onnxscript", "torchvision"]


def empty(w):
    (w.tmp / "empty").mkdir(exist_ok=True)
    return w.tmp / "empty"


def mistakes(w):
    """List mistakes that can be found without a model: (command, fragments of the message)."""
    distill = ["distill", w.base, "--images", w.photos, "-o", w.out]
    export = ["export", w.student, "-o", w.out]
    artifacts = ["artifacts", w.base, "--images", w.photos]
    check = ["check", w.bundle, "--images", w.photos, "--reference", w.student]
    nowhere = w.tmp / "no" / "x"
    return [
        ([*distill, "--recipe", "magic"], ["'magic'", "transplant"]),
        ([*distill, "--registers", "65"], ["got 65"]),
        ([*distill, "--epochs", "-1"], ["got -1"]),
        ([*distill, "--batch", "0"], ["batch: got 0"]),
        ([*distill, "--micro-batch", "0"], ["micro-batch: got 0", "at least 1"]),
        ([*distill, "--micro-batch", "-3"], ["micro-batch: got -3"]),
        ([*distill, "--lr", "2"], ["lr: got 2.0"]),
        ([*distill, "--strength", "9"], ["strength: got 9.0"]),
        ([*distill, "--holdout", "1"], ["holdout: got 1.0"]),
        ([*distill, "--views", "1"], ["views: got 1"]),
        ([*distill, "--precision", "fp8"], ["'fp8'", "auto, fp32 or bf16"]),
        ([*distill, "--device", "gpu"], ["'gpu'", "cuda:N"]),
        ([*distill, "--device", "cuda:01"], ["'cuda:01'", "cuda:N"]),
        ([*distill, "--device", "cuda:0,cuda:1,cuda:0"], ["got cuda:0 more than once", "name each GPU once"]),
        ([*distill, "--device", "cpu,cuda:0"], ["got 'cpu' in the list", "cuda:0,cuda:1"]),
        ([*distill, "--device", "cuda,cuda:1"], ["got 'cuda' in the list", "by number"]),
        ([*distill, "--device", "cuda:0,"], ["got '' in the list"]),
        ([*distill, "--image-size", "480by640"], ["'480by640'", "HEIGHTxWIDTH"]),
        ([*distill, "--resume"], ["no interrupted run"]),
        ([*distill[:-1], nowhere], ["there is no folder", "create it first"]),
        ([*distill[:-1], w.photos, "--force"], ["/photos holds files that phreg-deploy did not write"]),
        (["distill", w.base, "--images", w.tmp / "none", "-o", w.out], ["images: got", "there is nothing"]),
        (["distill", w.base, "--images", empty(w), "-o", w.out], ["holds no image"]),
        (["distill", w.tmp / "gone", *distill[2:]], ["model: got", "where there is nothing"]),
        (["distill", w.bundle, *distill[2:]], ["looks like a bundle"]),
        (
            ["distill", "vit_tiny_patch16_224", *distill[2:], "--checkpoint", w.tmp / "no.pth"],
            ["there is no file", "no.pth"],
        ),
        ([*export, "--precision", "int4"], ["'int4'", "fp32, fp16, bf16, int8 or fp8"]),
        ([*export, "--precision", "int8"], ["int8 needs --images DIR"]),
        ([*export, "--precision", "int8", "--images", empty(w)], ["holds no image"]),
        ([*export, "--image-size", "64,,72"], ["'64,,72'"]),
        ([*export, "--batch", "4:1:2"], ["'4:1:2'", "growing order"]),
        ([*export, "--precision", "fp16", "--keep-fp32", "("], ["'('", "no regular expression"]),
        ([*export[:-1], nowhere], ["there is no folder"]),
        (["export", "./gone", "-o", w.out], ["'./gone'", "where there is nothing"]),
        ([*export, "--checkpoint", w.checkpoint], ["both the folder"]),
        ([*artifacts, "--device", "tpu"], ["'tpu'"]),
        ([*artifacts, "--device", "cuda:0,cuda:1"], ["'cuda:0,cuda:1'", "expected auto, cpu, cuda or cuda:N."]),
        ([*artifacts, "--image-size", "large"], ["'large'"]),
        ([*artifacts, "--picture", nowhere], ["picture: there is no folder"]),
        ([*artifacts, "--backend", "tflite"], ["'tflite'", "auto, onnxruntime-cpu"]),
        (["artifacts", w.base, "--images", empty(w)], ["holds no image"]),
        (["artifacts", w.tmp / "gone", "--images", w.photos], ["where there is nothing"]),
        ([*check, "--cosine", "1.5"], ["cosine: got 1.5"]),
        ([*check, "--report", nowhere], ["report: there is no folder"]),
        ([*check, "--report", w.tmp], ["report: got the folder"]),
        ([*check[:3], empty(w), *check[4:]], ["holds no image"]),
        ([*check[:-1], w.tmp / "gone"], ["where there is nothing"]),
        ([*check, "--base", "vit_tiny_patch16_224", "--base-checkpoint", w.tmp / "no.pth"], ["no.pth"]),
    ]  # fmt: skip


def test_a_bad_option_is_refused_without_pytorch(world):
    table = mistakes(world)
    outcomes = without(BLOCKED, [[*command, "--json"] for command, _ in table])
    for (command, fragments), outcome in zip(table, outcomes):
        try:
            outcome.refused(2, *fragments)
        except AssertionError as error:
            raise AssertionError(f"{' '.join(str(word) for word in command)}: {error}") from None
    assert not world.out.exists()
    assert leftovers(world.tmp) == []


def test_every_option_of_distill_is_explained_in_one_line(run_cli):
    lines = run_cli("distill", "--help").out.splitlines()
    for option, word in (
        ("--micro-batch", "less memory"),
        ("--grad-checkpointing", "less memory"),
        ("--device", "cuda:0,cuda:1"),
    ):
        (line,) = [line for line in lines if line.split()[:1] == [option]]
        assert word in line


def test_every_recipe_can_be_given():
    from phreg_deploy.distill.recipes import RECIPES

    assert tuple(RECIPES) == arguments.RECIPES


def test_an_interrupted_run_is_named_before_pytorch_is_imported(world):
    partial = world.tmp / "out.partial"
    partial.mkdir()
    (partial / "settings.json").write_text("{}")
    command = ["distill", world.base, "--images", world.photos, "-o", world.out, "--json"]
    (outcome,) = without(BLOCKED, [command])
    outcome.refused(2, "an interrupted run is kept in", "--resume", "--force")


URL = "https://example.org/models/x"
URLS = {
    "model": lambda w: ["distill", URL, "--images", w.photos, "-o", w.out],
    "images": lambda w: ["distill", w.base, "--images", URL, "-o", w.out],
    "images with =": lambda w: ["artifacts", w.base, f"--images={URL}"],
    "image": lambda w: ["extract", w.bundle, URL, "-o", w.out],
    "bundle": lambda w: ["check", URL],
    "baseline": lambda w: ["profile", w.bundle, "--baseline", URL],
    "inspected": lambda w: ["inspect", URL],
    "checkpoint": lambda w: ["export", "vit_tiny_patch16_224", "-o", w.out, "--checkpoint", URL],
}


@pytest.mark.parametrize("place", URLS)
def test_a_url_is_called_a_url_with_both_slashes(world, run_cli, place):
    run_cli(*URLS[place](world), "--json").refused(2, f"got the URL {URL},", "expected a file or a folder", "Download")
    assert not world.out.exists()


def test_a_url_is_called_a_url_from_python_too(torch):
    from phreg_deploy.errors import PhregError
    from phreg_deploy.models.loading import load_model
    from phreg_deploy.runtime import FeatureExtractor

    for load in (load_model, FeatureExtractor.load):
        with pytest.raises(PhregError, match=f"got the URL {URL},"):
            load(URL)
