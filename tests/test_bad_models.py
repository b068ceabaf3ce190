"""Mistakes with models and weights: a table in which every row is a message and exit code 2."""

import json
import pickle
import zipfile
from fractions import Fraction

import pytest

from tests.bundle_changes import first_half
from tests.command_lines import artifacts, assert_mistake, distill, export

pytestmark = pytest.mark.usefixtures("torch")


def write_file(w, name, data):
    path = w.tmp / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_pickle(w):
    import torch

    path = w.tmp / "weights.pth"
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "callback": Fraction(1, 2)}, path)
    return path


def write_tensors(w, name="weights.pth", value=None):
    import torch

    path = w.tmp / name
    torch.save({"x": torch.zeros(2)} if value is None else value, path)
    return path


def write_squeezed(w):
    """Write a checkpoint whose zip is compressed: a few megabytes could hold terabytes."""
    import torch

    torch.save({"x": torch.zeros(1 << 20)}, w.tmp / "whole.pth")
    with zipfile.ZipFile(w.tmp / "whole.pth") as whole:
        members = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(w.tmp / "weights.pth", "w", zipfile.ZIP_DEFLATED) as squeezed:
        for name, data in members.items():
            squeezed.writestr(name, data)
    return w.tmp / "weights.pth"


def tensors_named_by_numbers():
    import torch

    return {0: torch.zeros(2), 1: torch.zeros(2)}


def with_argument(config, key, value):
    """Change one argument of the model in a config.json."""
    document = json.loads(config)
    document["model_args"] = {**document["model_args"], key: value}
    return json.dumps(document).encode()


def copy_with_nan(w):
    """Copy the base model with one NaN in its weights."""
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
    **{
        f"config with {key} of {value}": (
            lambda w, key=key, value=value: export(w, w.copy("base", config=lambda b: with_argument(b, key, value))),
            ["copy-of-base", f"says {key} {value}", "the weights beside it have at most"],
        )
        for key, value in (("depth", 10**6), ("embed_dim", 3 << 20), ("reg_tokens", 10**7), ("num_classes", 10**8))
    },
    "weights truncated": (
        lambda w: distill(w, w.copy("base", model=first_half)),
        ["model.safetensors", "corrupt or truncated"],
    ),
    "weights empty": (lambda w: export(w, w.copy("base", model=b"")), ["model.safetensors", "corrupt or truncated"]),
    "weights of noise": (lambda w: artifacts(w, w.copy("base", model=b"\x07" * 999)), ["model.safetensors", "corrupt"]),
    "weights with NaN": (lambda w: distill(w, copy_with_nan(w)), ["NaN", "blocks.0.mlp.fc1.weight", "expected finite"]),
    "weights with NaN, export": (lambda w: export(w, copy_with_nan(w)), ["NaN", "blocks.0.mlp.fc1.weight"]),
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
        lambda w: export(w, TINY, "--checkpoint", write_file(w, "w.ckpt", b"x")),
        ["w.ckpt", ".safetensors, .pth"],
    ),
    "checkpoint truncated": (
        lambda w: distill(
            w, TINY, "--checkpoint", write_file(w, "w.safetensors", first_half(w.checkpoint.read_bytes()))
        ),
        ["w.safetensors", "corrupt or truncated"],
    ),
    "checkpoint empty": (
        lambda w: artifacts(w, TINY, "--checkpoint", write_file(w, "w.safetensors", b"")),
        ["w.safetensors", "corrupt"],
    ),
    "pth empty": (
        lambda w: export(w, TINY, "--checkpoint", write_file(w, "w.pth", b"")),
        ["w.pth", "cannot be read safely"],
    ),
    "pth of noise": (
        lambda w: export(w, TINY, "--checkpoint", write_file(w, "w.pth", b"PK\x03\x04nope")),
        ["w.pth", "cannot be read safely"],
    ),
    "pth a bare pickle": (
        lambda w: distill(w, TINY, "--checkpoint", write_file(w, "w.pth", pickle.dumps(Fraction(1, 2)))),
        ["w.pth", "more than tensors"],
    ),
    "pth with an object": (
        lambda w: distill(w, TINY, "--checkpoint", write_pickle(w)),
        ["weights.pth", "more than tensors", ".safetensors"],
    ),
    "pth compressed": (
        lambda w: distill(w, TINY, "--checkpoint", write_squeezed(w)),
        ["weights.pth", "is compressed", ".safetensors"],
    ),
    "pth without a state dict": (
        lambda w: export(w, TINY, "--checkpoint", write_tensors(w, value=[1, 2])),
        ["no state dict"],
    ),
    "pth with numbers for names": (
        lambda w: distill(w, TINY, "--checkpoint", write_tensors(w, value=tensors_named_by_numbers())),
        ["weights.pth", "names a tensor by the int 0", "expected names of weights"],
    ),
    "path with nothing": (lambda w: distill(w, w.tmp / "gone"), ["gone", "where there is nothing", "config.json"]),
    "pth of another model": (
        lambda w: distill(w, TINY, "--checkpoint", write_tensors(w)),
        ["weights.pth", f"do not fit {TINY}"],
    ),
}


@pytest.mark.parametrize("mistake", MODELS)
def test_a_mistake_is_a_message_and_exit_code_2(world, run_cli, mistake):
    arguments, fragments = MODELS[mistake]
    assert_mistake(world, run_cli, arguments, fragments)
