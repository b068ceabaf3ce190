"""Mistakes with models, weights, images and options: a table in which every row is a message and an exit code.

``test_broken_bundles`` and ``test_outputs`` have the tables for bundles and outputs.
"""

import pickle
import sys
from fractions import Fraction

import pytest

from phreg_deploy.bundle.bundle import Bundle
from tests.cli_helpers import leftovers

pytestmark = pytest.mark.usefixtures("torch")


def distill(w, model, *more):
    return ["distill", model, "--images", w.photos, "-o", w.out, *more]


def export(w, model, *more):
    return ["export", model, "-o", w.out, *more]


def artifacts(w, model, *more):
    return ["artifacts", model, "--images", w.photos, *more]


def write(w, name, data):
    path = w.tmp / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def images(w, **files):
    folder = w.tmp / "pictures"
    folder.mkdir()
    for stem, data in files.items():
        (folder / f"{stem}.jpg").write_bytes(data)
    return folder


def half(data):
    return data[: len(data) // 2]


def pickled(w):
    import torch

    path = w.tmp / "weights.pth"
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "callback": Fraction(1, 2)}, path)
    return path


def tensors(w, name="weights.pth", value=None):
    import torch

    path = w.tmp / name
    torch.save({"x": torch.zeros(2)} if value is None else value, path)
    return path


def numbered():
    import torch

    return {0: torch.zeros(2), 1: torch.zeros(2)}


def poisoned(w):
    """The base model with one NaN in it."""
    from safetensors.torch import load_file, save_file

    folder = w.copy("base")
    state = load_file(folder / "model.safetensors")
    state["blocks.0.mlp.fc1.weight"][3, 4] = float("nan")
    save_file(state, folder / "model.safetensors")
    return folder


TINY = "vit_tiny_patch16_224"
# id: (arguments, fragments); all exit with 2
MODELS = {
    "name that is not one": (
        lambda w: distill(w, "vit_tinny_patch16_224"),
        ["'vit_tinny_patch16_224'", "closest names are", TINY],
    ),
    "name like nothing": (lambda w: export(w, "zzzzzz"), ["neither a timm model nor a folder", "list_models"]),
    "folder that is not there": (lambda w: artifacts(w, "local-dir:nowhere"), ["local-dir:nowhere", "config.json"]),
    "file for a model": (lambda w: distill(w, w.checkpoint), ["got the file", "--checkpoint"]),
    "folder without weights": (lambda w: export(w, w.copy("base", model=None)), ["holds no model.safetensors"]),
    "folder without config": (lambda w: distill(w, w.copy("base", config=None)), ["holds no config.json"]),
    "bundle for a model": (lambda w: distill(w, w.bundle), ["holds no config.json", "looks like a bundle"]),
    "config not JSON": (lambda w: distill(w, w.copy("base", config=b"{nope")), ["config.json", "not valid JSON"]),
    "config empty": (lambda w: export(w, w.copy("base", config=b"")), ["config.json", "not valid JSON"]),
    "config not text": (lambda w: export(w, w.copy("base", config=b"\xff\xfe\x80")), ["config.json", "not valid JSON"]),
    "config a list": (lambda w: artifacts(w, w.copy("base", config=b"[]")), ["config.json"]),
    "config without architecture": (lambda w: artifacts(w, w.copy("base", config=b"{}")), ["copy-of-base"]),
    "config of another model": (
        lambda w: distill(w, w.copy("base", config=lambda b: b.replace(b'"depth": 3', b'"depth": 2'))),
        ["timm cannot build", "copy-of-base", "blocks.2"],
    ),
    "weights truncated": (
        lambda w: distill(w, w.copy("base", model=half)),
        ["model.safetensors", "corrupt or truncated"],
    ),
    "weights empty": (lambda w: export(w, w.copy("base", model=b"")), ["model.safetensors", "corrupt or truncated"]),
    "weights of noise": (lambda w: artifacts(w, w.copy("base", model=b"\x07" * 999)), ["model.safetensors", "corrupt"]),
    "weights with NaN": (lambda w: distill(w, poisoned(w)), ["NaN", "blocks.0.mlp.fc1.weight", "expected finite"]),
    "weights with NaN, export": (lambda w: export(w, poisoned(w)), ["NaN", "blocks.0.mlp.fc1.weight"]),
    "record damaged": (lambda w: export(w, w.copy("student", phreg=b"{")), ["phreg.json", "damaged"]),
    "record of a newer format": (
        lambda w: export(w, w.copy("student", phreg=b'{"format": 9}')),
        ["format 9", "at most 1", "Upgrade"],
    ),
    "record without scores": (
        lambda w: export(w, w.copy("student", phreg=b'{"format": 1}')),
        ["phreg.json", "damaged"],
    ),
    "student distilled again": (lambda w: distill(w, w.student), ["already has 4 register tokens"]),
    "swin": (
        lambda w: distill(w, "swin_tiny_patch4_window7_224"),
        ["swin_tiny_patch4_window7_224", "not supported", "merges patches"],
    ),
    "beit": (
        lambda w: export(w, "beit_base_patch16_224"),
        ["beit_base_patch16_224", "not supported", "relative position bias"],
    ),
    "distilled deit": (
        lambda w: artifacts(w, "deit_base_distilled_patch16_224"),
        ["not supported", "distillation token"],
    ),
    "resnet": (lambda w: distill(w, "resnet18"), ["resnet18", "not supported", "another family"]),
    "resnet, random": (
        lambda w: export(w, "resnet18", "--random-weights"),
        ["resnet18", "not supported", "another family"],
    ),
    "resnet, checkpoint": (
        lambda w: artifacts(w, "resnet18", "--checkpoint", w.checkpoint),
        ["resnet18", "not supported"],
    ),
    "no network": (
        lambda w: distill(w, "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ["cannot be downloaded", "--checkpoint FILE"],
    ),
    "no such weights": (
        lambda w: export(w, f"{TINY}.nope"),
        [f"'{TINY}.nope'", "Pretrained weights exist as", "--checkpoint FILE"],
    ),
    "folder and checkpoint": (
        lambda w: distill(w, w.base, "--checkpoint", w.checkpoint),
        ["both the folder", "one of them"],
    ),
    "folder and random weights": (lambda w: export(w, w.base, "--random-weights"), ["--random-weights"]),
    "checkpoint and random weights": (
        lambda w: export(w, TINY, "--checkpoint", w.checkpoint, "--random-weights"),
        ["--random-weights", "--checkpoint"],
    ),
    "checkpoint missing": (
        lambda w: distill(w, TINY, "--checkpoint", w.tmp / "no.pth"),
        ["there is no file", "no.pth"],
    ),
    "checkpoint a folder": (lambda w: distill(w, TINY, "--checkpoint", w.tmp), ["there is no file"]),
    "checkpoint of another suffix": (
        lambda w: export(w, TINY, "--checkpoint", write(w, "w.ckpt", b"x")),
        ["w.ckpt", ".safetensors, .pth"],
    ),
    "checkpoint truncated": (
        lambda w: distill(w, TINY, "--checkpoint", write(w, "w.safetensors", half(w.checkpoint.read_bytes()))),
        ["w.safetensors", "corrupt or truncated"],
    ),
    "checkpoint empty": (
        lambda w: artifacts(w, TINY, "--checkpoint", write(w, "w.safetensors", b"")),
        ["w.safetensors", "corrupt"],
    ),
    "pth empty": (
        lambda w: export(w, TINY, "--checkpoint", write(w, "w.pth", b"")),
        ["w.pth", "cannot be read safely"],
    ),
    "pth of noise": (
        lambda w: export(w, TINY, "--checkpoint", write(w, "w.pth", b"PK\x03\x04nope")),
        ["w.pth", "cannot be read safely"],
    ),
    "pth a bare pickle": (
        lambda w: distill(w, TINY, "--checkpoint", write(w, "w.pth", pickle.dumps(Fraction(1, 2)))),
        ["w.pth", "more than tensors"],
    ),
    "pth with an object": (
        lambda w: distill(w, TINY, "--checkpoint", pickled(w)),
        ["weights.pth", "more than tensors", ".safetensors"],
    ),
    "pth without a state dict": (
        lambda w: export(w, TINY, "--checkpoint", tensors(w, value=[1, 2])),
        ["no state dict"],
    ),
    "pth with numbers for names": (
        lambda w: distill(w, TINY, "--checkpoint", tensors(w, value=numbered())),
        ["weights.pth", "names a tensor by the int 0", "expected names of weights"],
    ),
    "path with nothing": (lambda w: distill(w, w.tmp / "gone"), ["gone", "where there is nothing", "config.json"]),
    "pth of another model": (
        lambda w: distill(w, TINY, "--checkpoint", tensors(w)),
        ["weights.pth", f"do not fit {TINY}"],
    ),
}
IMAGES = {
    "no folder": (
        lambda w: ["distill", w.base, "--images", w.tmp / "none", "-o", w.out],
        ["none", "there is nothing", "a folder of images"],
    ),
    "a file": (
        lambda w: ["artifacts", w.base, "--images", w.photos / "frame-00.png"],
        ["there is a file", "a folder of images"],
    ),
    "an empty folder": (lambda w: ["distill", w.base, "--images", images(w), "-o", w.out], ["holds no image", ".jpg"]),
    "none readable": (
        lambda w: ["distill", w.base, "--images", images(w, a=b"", b=b"text"), "-o", w.out],
        ["none of the 2 image files", "a.jpg", "is empty"],
    ),
    "none readable, artifacts": (
        lambda w: ["artifacts", w.base, "--images", images(w, a=b"GIF89a")],
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
        ["'magic'", "transplant, random-registers or ph-reg"],
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
    for group, rows in (("model", MODELS), ("images", IMAGES), ("options", OPTIONS))
    for name, (arguments, fragments) in rows.items()
]


@pytest.mark.parametrize(("arguments", "fragments"), TABLE)
def test_a_mistake_is_a_message_and_exit_code_2(world, run_cli, arguments, fragments):
    outcome = run_cli(*arguments(world), "--json")
    outcome.refused(2, *fragments)
    assert not world.out.exists()
    assert leftovers(world.tmp) == []


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
