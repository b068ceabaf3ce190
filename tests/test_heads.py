"""Heads: what they compute, their files, and heads that other programs trained."""

import dataclasses
import json
import os

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.heads import Head
from phreg_deploy.images.upsampling import upsample

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(2, 3, 4, 6)).astype(np.float32)
WEIGHT, BIAS = RNG.normal(size=(3, 6)).astype(np.float32), np.array([0.1, 0.2, 0.3], np.float32)
NAMES = ("sky", "road", "tree")


def head(**changes):
    return dataclasses.replace(Head(WEIGHT, BIAS, classes=NAMES), **changes)


def test_logits_and_labels():
    logits = head().logits(FEATURES)
    np.testing.assert_allclose(logits[1, 2, 3], WEIGHT @ FEATURES[1, 2, 3] + BIAS, rtol=1e-5)
    assert logits.dtype == np.float32
    labels = head().labels(FEATURES)
    assert (labels.dtype, labels.shape) == (np.uint8, (2, 3, 4))
    np.testing.assert_array_equal(labels, logits.argmax(-1))
    assert head().labels(FEATURES, (30, 44)).shape == (2, 30, 44)
    with pytest.raises(PhregError, match=r"expected \(B, Hp, Wp, 6\)"):
        head().logits(FEATURES[..., :5])


def test_maps_are_enlarged_as_in_pytorch(torch):
    for size in ((30, 44), (7, 5), (3, 4), (2, 2)):
        maps = torch.from_numpy(FEATURES.transpose(0, 3, 1, 2))
        expected = torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(upsample(FEATURES, size).transpose(0, 3, 1, 2), expected, atol=1e-6)
    assert upsample(FEATURES[:, :1, :1], (2, 3)).shape == (2, 2, 3, 6)


def test_depth_is_an_exponential_or_a_mean_of_bins():
    plain = Head(WEIGHT[:1], BIAS[:1], task="depth", depth_range=(0.5, 2.0))
    depth = plain.labels(FEATURES)
    np.testing.assert_allclose(depth, np.clip(np.exp(plain.logits(FEATURES)[..., 0]), 0.5, 2), rtol=1e-5)
    binned = Head(WEIGHT, BIAS, task="depth", bins=(1.0, 2.0, 4.0))
    share = np.exp(binned.logits(FEATURES))
    share /= share.sum(-1, keepdims=True)
    np.testing.assert_allclose(binned.labels(FEATURES), share @ [1, 2, 4], rtol=1e-5)


def test_a_written_head_is_read_again_without_a_change(tmp_path):
    facts = {"colours": ((1, 2, 3), (4, 5, 6), (7, 8, 9)), "layers": (3, 6), "ignore": 255}
    heads = {
        "labels": head(**facts, trained_on={"images": 5, "names": ["a"]}),
        "depth": Head(WEIGHT, BIAS, task="depth", bins=(1.0, 2.0, 4.0), depth_range=(0.1, 9.0)),
    }
    for name, written in heads.items():
        written.write(tmp_path / name)
        again = Head.read(tmp_path / name)
        np.testing.assert_array_equal(again.weight, written.weight)
        np.testing.assert_array_equal(again.bias, written.bias)
        for field in dataclasses.fields(Head)[2:]:
            assert getattr(again, field.name) == getattr(written, field.name), field.name
    with pytest.raises(PhregError, match="--force"):
        head().write(tmp_path / "labels")
    head().write(tmp_path / "labels", force=True)
    assert Head.read(tmp_path / "labels").layers is None


def test_a_head_selects_its_layers():
    outputs = {"features": FEATURES, "features.3": FEATURES[..., :3], "features.6": -FEATURES[..., 3:]}
    joined = head(layers=(3, 6)).select(outputs)
    np.testing.assert_array_equal(joined, np.concatenate([FEATURES[..., :3], -FEATURES[..., 3:]], -1))
    np.testing.assert_array_equal(head().select(outputs), FEATURES)
    with pytest.raises(PhregError, match=r"reads features\.9"):
        head(layers=(3, 9)).select(outputs)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "batch norm", "bare"])
def test_a_head_of_another_program_computes_the_same(torch, tmp_path, suffix, kind):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    layers = {"conv_seg": torch.nn.Conv2d(6, 3, 1)} if kind != "linear" else {"conv_seg": torch.nn.Linear(6, 3)}
    if kind == "bare":
        layers["conv_seg"] = torch.nn.Conv2d(6, 3, 1, bias=False)
    if kind == "batch norm":
        layers = {"bn": torch.nn.BatchNorm2d(6), **layers}
        for value in (layers["bn"].weight, layers["bn"].bias, layers["bn"].running_mean):
            torch.nn.init.normal_(value)
        layers["bn"].running_var.uniform_(0.5, 2)
    module = torch.nn.ModuleDict({"decode_head": torch.nn.ModuleDict(layers)}).eval()
    path = tmp_path / f"head{suffix}"
    save_file(module.state_dict(), path) if suffix == ".safetensors" else torch.save(module.state_dict(), path)
    x = torch.from_numpy(FEATURES if kind == "linear" else FEATURES.transpose(0, 3, 1, 2))
    for layer in layers.values():
        x = layer(x)
    expected = x.detach().numpy() if kind == "linear" else x.detach().numpy().transpose(0, 2, 3, 1)
    read = Head.read(path)
    np.testing.assert_allclose(read.logits(FEATURES), expected, atol=1e-5)
    assert read.classes == ("class 0", "class 1", "class 2")


def test_a_normalisation_that_is_not_folded_is_folded_on_reading(tmp_path):
    from safetensors.numpy import save_file

    mean, std = FEATURES.mean((0, 1, 2)), FEATURES.std((0, 1, 2))
    head().write(tmp_path / "head")
    facts = json.loads((tmp_path / "head/head.json").read_text())
    standard = {"weight": WEIGHT, "bias": BIAS, "mean": mean, "std": std}
    norm = {"norm.running_mean": mean, "norm.running_var": std**2 - 0.01, "weight": WEIGHT, "bias": BIAS}
    for kind, tensors in (({"kind": "standard"}, standard), ({"kind": "batch_norm", "eps": 0.01}, norm)):
        (tmp_path / "head/head.json").write_text(json.dumps({**facts, "normalisation": kind}))
        save_file(tensors, tmp_path / "head/head.safetensors")
        expected = (FEATURES - mean) / std @ WEIGHT.T + BIAS
        np.testing.assert_allclose(Head.read(tmp_path / "head").logits(FEATURES), expected, atol=1e-4)


BAD_TENSORS = {
    "no layer": ({"gain": np.ones(3)}, "it holds none"),
    "two layers": ({"a.weight": WEIGHT, "b.weight": WEIGHT}, r"2 \(a\.weight, b\.weight\)"),
    "a 3x3 convolution": ({"weight": np.ones((2, 6, 3, 3))}, "it holds none"),
    "another layer": ({"weight": WEIGHT, "scale": np.ones(6)}, "holds scale as well"),
    "NaN": ({"weight": WEIGHT * np.nan}, "NaN"),
    "a bias of another length": ({"weight": WEIGHT, "bias": np.ones(2)}, r"\(2,\), expected \(3,\)"),
    "a norm of another width": ({"weight": WEIGHT, "n.running_mean": np.ones(4)}, r"\(4,\)"),
    "a norm without variance": ({"weight": WEIGHT, "n.running_mean": np.ones(6)}, "nothing as n.running_var"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_state_dict_is_refused(tmp_path, case):
    from safetensors.numpy import save_file

    tensors, message = BAD_TENSORS[case]
    save_file({key: np.asarray(value, np.float32) for key, value in tensors.items()}, tmp_path / "head.safetensors")
    with pytest.raises(PhregError, match=message):
        Head.read(tmp_path / "head.safetensors")


BAD_FACTS = {
    "a newer format": ({"format": 2}, "Upgrade"),
    "no format": ({"format": None}, "no format number"),
    "another width": ({"width": 7}, "says 7 channels"),
    "a class too few": ({"classes": ["sky"]}, "1 names of classes for 3"),
    "an unknown normalisation": ({"normalisation": {"kind": "layer"}}, "folded, standard or batch_norm"),
    "a colour out of range": ({"colours": [[0, 0, 256]] * 3}, "8-bit RGB"),
    "colours of text": ({"colours": "red"}, "8-bit RGB"),
    "an unknown task": ({"task": "normals"}, "segmentation or depth"),
    "layers of text": ({"layers": ["last"]}, "numbers of blocks"),
    "classes of depth": ({"task": "depth"}, "3 outputs of a depth head"),
    "a number for names": ({"classes": 3}, "damaged"),
}


@pytest.mark.parametrize("case", BAD_FACTS)
def test_bad_facts_are_refused(tmp_path, case):
    change, message = BAD_FACTS[case]
    head().write(tmp_path / "head")
    path = tmp_path / "head/head.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PhregError, match=message):
        Head.read(tmp_path / "head")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_place_of_the_facts_is_not_waited_for(tmp_path):
    (tmp_path / "head").mkdir()
    os.mkfifo(tmp_path / "head/head.json")
    with pytest.raises(PhregError, match="it is a pipe, a device or a folder"):
        Head.read(tmp_path / "head")


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_a_damaged_or_missing_file_is_refused(tmp_path, name):
    head().write(tmp_path / "head")
    for damage in (lambda path: path.write_bytes(b"{"), lambda path: path.unlink()):
        damage(tmp_path / "head" / name)
        with pytest.raises(PhregError, match=name):
            Head.read(tmp_path / "head")


def test_a_pickle_is_never_loaded(torch, tmp_path):
    torch.save({"weight": torch.ones(2, 2), "code": test_a_pickle_is_never_loaded}, tmp_path / "head.pth")
    with pytest.raises(PhregError, match="cannot be read safely"):
        Head.read(tmp_path / "head.pth")
