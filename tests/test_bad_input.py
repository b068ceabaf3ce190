"""Mistakes with images and options: a table in which every row is a message and an exit code.

``test_bad_models``, ``test_bad_bundles`` and ``test_outputs`` have the tables for models, bundles and outputs.
"""

import sys

import pytest

from phreg_deploy.bundle.bundle import Bundle
from tests.command_lines import artifacts, assert_mistake, distill, export

pytestmark = pytest.mark.usefixtures("torch")


def make_images(w, **files):
    folder = w.tmp / "pictures"
    folder.mkdir()
    for stem, data in files.items():
        (folder / f"{stem}.jpg").write_bytes(data)
    return folder


IMAGES = {
    "no folder": (
        lambda w: ["distill", w.base, "--images", w.tmp / "none", "-o", w.out],
        ["none", "there is nothing", "a folder of images"],
    ),
    "a file": (
        lambda w: ["artifacts", w.base, "--images", w.photos / "frame-00.png"],
        ["there is a file", "a folder of images"],
    ),
    "an empty folder": (
        lambda w: ["distill", w.base, "--images", make_images(w), "-o", w.out],
        ["holds no image", ".jpg"],
    ),
    "none readable": (
        lambda w: ["distill", w.base, "--images", make_images(w, a=b"", b=b"text"), "-o", w.out],
        ["none of the 2 image files", "a.jpg", "is empty"],
    ),
    "none readable, artifacts": (
        lambda w: ["artifacts", w.base, "--images", make_images(w, a=b"GIF89a")],
        ["none of the 1 image files"],
    ),
}
OPTIONS = {
    "not a multiple": (
        lambda w: distill(w, w.base, "--image-size", "60"),
        ["60x60", "multiples of the patch size 8x8", "56x56 and 64x64"],
    ),
    "not a multiple, export": (lambda w: export(w, w.student, "--image-size", "64x70"), ["64x70", "64x64 and 72x72"]),
    "not a multiple, artifacts": (lambda w: artifacts(w, w.base, "--image-size", "100"), ["96x96 and 104x104"]),
    "size below a patch": (lambda w: export(w, w.student, "--image-size", "4"), ["4x4", "8x8"]),
    "size no number": (lambda w: export(w, w.student, "--image-size", "large"), ["'large'", "480x640"]),
    "size zero": (lambda w: distill(w, w.base, "--image-size", "0"), ["'0'", "HEIGHTxWIDTH"]),
    "range of two": (lambda w: export(w, w.student, "--image-size", "48:64"), ["'48:64'", "MIN:OPT:MAX"]),
    "range that falls": (lambda w: export(w, w.student, "--image-size", "96:64:48"), ["growing order", "224:518:1036"]),
    "list with a gap": (lambda w: export(w, w.student, "--image-size", "64,,72"), ["'64,,72'"]),
    "batch zero": (lambda w: export(w, w.student, "--batch", "0"), ["'0'", "from 1"]),
    "batch of words": (lambda w: export(w, w.student, "--batch", "1:x:3"), ["'1:x:3'", "MIN:OPT:MAX"]),
    "precision unknown": (
        lambda w: export(w, w.student, "--precision", "int4"),
        ["'int4'", "fp32, fp16, bf16, int8 or fp8"],
    ),
    "precision of training": (lambda w: distill(w, w.base, "--precision", "fp8"), ["'fp8'", "auto, fp32 or bf16"]),
    "recipe unknown": (
        lambda w: distill(w, w.base, "--recipe", "magic"),
        ["'magic'", "transplant, random-registers, ph-reg, ph-reg-clip or sinder"],
    ),
    "registers negative": (lambda w: distill(w, w.base, "--registers", "-1"), ["got -1", "0 to 64"]),
    "epochs negative": (lambda w: distill(w, w.base, "--epochs", "-1"), ["got -1", "at least 0"]),
    "views too few": (lambda w: distill(w, w.base, "--views", "1"), ["got 1", "at least 2"]),
    "views too many": (lambda w: distill(w, w.base, "--views", "19"), ["got 19", "grid of 8 x 8", "at most 18"]),
    "rate not finite": (lambda w: distill(w, w.base, "--lr", "nan"), ["got nan", "3e-4"]),
    "strength zero": (lambda w: distill(w, w.base, "--strength", "0"), ["got 0.0", "above 0"]),
    "strength without a move": (
        lambda w: distill(w, w.base, "--recipe", "random-registers", "--strength", "1"),
        ["moves no neurons", "transplant"],
    ),
    "registers of singular values": (
        lambda w: distill(w, w.base, "--recipe", "sinder", "--registers", "2"),
        ["registers: got 2", "singular values alone", "--registers 0"],
    ),
    "default registers of singular values": (
        lambda w: distill(w, w.base, "--unlock", "singular-values"),
        ["registers: got 4", "singular values alone", "--registers 0"],
    ),
    "layers without targets": (
        lambda w: distill(w, w.base, "--recipe", "sinder", "--layers", "1,2"),
        ["layers: got '1,2'", "recipe sinder", "reads no targets"],
    ),
    "holdout of everything": (lambda w: distill(w, w.base, "--holdout", "1"), ["got 1.0", "below 1"]),
    "seed negative": (lambda w: distill(w, w.base, "--seed", "-1", "--epochs", "1"), ["-1"]),
    "seed huge": (lambda w: distill(w, w.base, "--seed", 10**25), [str(10**25)]),
    "device unknown": (lambda w: distill(w, w.base, "--device", "gpu"), ["'gpu'", "cuda:N"]),
    "device unknown, artifacts": (
        lambda w: artifacts(w, w.base, "--device", "cuda:x"),
        ["'cuda:x'", "auto, cpu, cuda"],
    ),
    "median zero": (lambda w: artifacts(w, w.base, "--limit", "1", "--median", "0"), ["median"]),
    "resume of nothing": (lambda w: distill(w, w.base, "--resume"), ["no interrupted run", "without --resume"]),
    "registers too many": (lambda w: distill(w, w.base, "--registers", "65"), ["got 65", "0 to 64"]),
    "target unknown": (lambda w: export(w, w.student, "--target", "npu"), ["'npu'", "cpu or trt"]),
    "backend for PyTorch": (lambda w: artifacts(w, w.base, "--backend", "openvino"), ["--backend goes with a bundle"]),
    "device for a bundle": (
        lambda w: artifacts(w, w.bundle, "--device", "cpu"),
        ["--device goes with a PyTorch model"],
    ),
    "checkpoint for no reference": (
        lambda w: ["check", w.bundle, "--images", w.photos, "--reference-checkpoint", w.checkpoint],
        ["--reference-checkpoint", "give it as --reference"],
    ),
    "option unknown": (lambda w: distill(w, w.base, "--epoch", "3"), ["No such option", "--epoch"]),
    "option missing": (lambda w: ["distill", w.base, "-o", w.out], ["Missing option", "--images"]),
    "argument missing": (lambda w: ["export", "-o", w.out], ["Missing argument", "MODEL"]),
    "number wanted": (lambda w: distill(w, w.base, "--epochs", "many"), ["--epochs", "'many'"]),
    "choice wanted": (lambda w: export(w, w.base, "--format", "pb"), ["--format", "'pb'", "onnx"]),
    "command unknown": (lambda w: ["distil", w.base], ["no command 'distil'", "Did you mean 'distill'?"]),
    "command like nothing": (lambda w: ["zzz"], ["no command 'zzz'", "distill, export"]),
}
TABLE = [
    pytest.param(arguments, fragments, id=f"{group}: {name}")
    for group, rows in (("images", IMAGES), ("options", OPTIONS))
    for name, (arguments, fragments) in rows.items()
]


@pytest.mark.parametrize(("arguments", "fragments"), TABLE)
def test_a_mistake_is_a_message_and_exit_code_2(world, run_cli, arguments, fragments):
    assert_mistake(world, run_cli, arguments, fragments)


def test_without_json_stdout_stays_empty(world, run_cli):
    outcome = run_cli(*export(world, world.student, "--image-size", "60"))
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1].startswith("Error: image size: got 60x60")


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
@pytest.mark.parametrize("command", [distill, artifacts])
def test_a_gpu_that_is_not_there_is_exit_code_4(world, run_cli, torch, command, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run_cli(*command(world, world.base, "--device", device), "--json").refused(4, f"'{device}'", "GPU")
    assert not world.out.exists()


def test_an_engine_that_cannot_be_built_here_is_exit_code_4_and_leaves_the_bundle_ready(world, run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    run_cli(*export(world, world.student, "--format", "trt"), "--json").refused(
        4, "trt", f"phreg-deploy build {world.out.name}"
    )
    Bundle.read(world.out).verify()
