"""Readouts of CLIP: MaskCLIP's and NACLIP's last block, written again here, and bundles that serve them."""

import copy
import json
import math

import numpy as np
import onnx
import pytest
import torch

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.validity import read_manifest
from phreg_deploy.calibration import calibrate
from phreg_deploy.errors import PhregError
from phreg_deploy.export import export
from phreg_deploy.models import hooks
from phreg_deploy.models.answers import model_answers
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.models.readouts import with_readout
from phreg_deploy.models.registers import add_registers
from phreg_deploy.readout import Readout
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import judge_exam, missed_gates
from tests.cli_helpers import invoke
from tests.small_models import save, small

FAMILIES = ["clip-quickgelu", "dinov2", "dinov3", "eva02", "eva02-base", "siglip", "sapiens2", "gated", "normed"]


def before_last_block(model, images):
    """Return the tokens that the last block reads, and its rotary embedding."""
    seen = []
    handle = model.blocks[-1].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args[0], kwargs.get("rope"))), with_kwargs=True
    )
    model.forward_features(images)
    handle.remove()
    return seen[0]


def scaled(block, y):
    gamma = getattr(getattr(block, "ls1", None), "gamma", getattr(block, "gamma_1", None))
    return y if gamma is None else y * gamma


def maskclip(model, images):
    """The last block's value and output projections alone."""
    x, _ = before_last_block(model, images)
    block = model.blocks[-1]
    attn, normed = block.attn, block.norm1(x)
    if attn.qkv is None:
        values = attn.v_proj(normed)
        if len(attn.v_proj.weight) < model.embed_dim:  # keys and values that all heads share
            values = values.repeat(1, 1, attn.num_heads)
    else:
        bias = attn.qkv.bias if getattr(attn, "q_bias", None) is None else torch.cat([attn.q_bias] * 2 + [attn.v_bias])
        values = normed @ attn.qkv.weight[2 * model.embed_dim :].T + bias[2 * model.embed_dim :]
    values = attn.norm(values)
    if attn.gate is not None:
        values = values * torch.sigmoid(attn.gate(normed))
    return scaled(block, attn.proj(values))


def naclip(model, images):
    """timm's own attention with the queries' weights set to the keys', and NACLIP's window as its mask."""
    x, rope = before_last_block(model, images)
    block, (rows, columns), prefix = model.blocks[-1], model.patch_embed.grid_size, model.num_prefix_tokens
    attn = copy.deepcopy(block.attn)
    width = model.embed_dim
    with torch.no_grad():
        attn.q_norm = attn.k_norm
        if attn.qkv is None:
            shared = width // len(attn.k_proj.weight)
            attn.q_proj.weight.copy_(attn.k_proj.weight.repeat(shared, 1))
            if attn.q_proj.bias is not None:
                keys = torch.zeros(width) if attn.k_proj.bias is None else attn.k_proj.bias.repeat(shared)
                attn.q_proj.bias.copy_(keys)
        else:
            attn.qkv.weight[:width] = attn.qkv.weight[width : 2 * width]
            if attn.qkv.bias is not None:
                attn.qkv.bias[:width] = attn.qkv.bias[width : 2 * width]
            if getattr(attn, "q_bias", None) is not None:
                attn.q_bias.zero_()
    window = torch.zeros(prefix + rows * columns, prefix + rows * columns)
    for a in range(rows * columns):
        for b in range(rows * columns):
            square = (a // columns - b // columns) ** 2 + (a % columns - b % columns) ** 2
            window[prefix + a, prefix + b] = math.exp(-square / (2 * 5.0**2))
    more = {} if rope is None else {"rope": rope}
    return scaled(block, attn(block.norm1(x), attn_mask=window, **more))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "written"), [("value", maskclip), ("neighbour", naclip)])
def test_readouts_equal_an_independent_writing(family, name, written):
    model = small(family, seed=3)
    images = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    features = hooks.forward(with_readout(model, Readout(name)), images)
    tokens = written(model, images)
    torch.testing.assert_close(features.tokens, hooks.final_norm(model)(tokens), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.norms, tokens[:, features.prefix :].norm(dim=-1), rtol=1e-4, atol=1e-5)
    plain = hooks.forward(model, images)
    assert (plain.patches - features.patches).abs().max() > 0.1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_a_projection_is_the_models_own_head():
    model = small("clip-quickgelu")
    images = torch.randn(2, 3, 64, 64)
    projected = hooks.forward(with_readout(model, Readout("final", True)), images)
    plain = hooks.forward(model, images)
    torch.testing.assert_close(projected.patches, plain.patches @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(projected.cls, model(images))
    torch.testing.assert_close(projected.norms, plain.norms)


@pytest.mark.parametrize(
    ("family", "reason"), [("augreg", "no projection"), ("siglip", "AttentionPoolLatent and Linear")]
)
def test_a_model_without_projection_is_refused(family, reason):
    with pytest.raises(PhregError, match=f"^project: .*{reason}.*expected a CLIP"):
        with_readout(small(family), Readout("value", True))


# Bundles


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    model = add_registers(small("clip-quickgelu", depth=3), 2)
    return save(model, tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module", params=["value", "neighbour"])
def served(request, clip):
    """A bundle for a range of sizes, with a layer beside the projected readout."""
    options = {"image_size": "48x64:64:96", "batch": "1:1:2", "layers": "1"}
    return export(str(clip), clip.parent / request.param, readout=request.param, project=True, **options)


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
def test_a_bundle_serves_what_pytorch_computes_at_other_sizes(served, clip, backend):
    pytest.importorskip(backend.partition("-")[0])
    manifest = served.manifest
    assert json.loads((served.folder / "manifest.json").read_text())["readout"] == {
        "name": served.folder.name,
        "project": True,
    }
    assert manifest.outputs["features"]["shape"] == ["B", "Hp", "Wp", 7]
    assert manifest.outputs["features.1"]["shape"] == ["B", "Hp", "Wp", 48]
    with FeatureExtractor.load(served.folder, backend, compute="fp32") as extractor:
        for height, width in ((48, 64), (64, 64), (80, 96)):
            frames = np.random.default_rng(height).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
            dense = extractor.dense(frames)
            model = with_readout(load_model(str(clip), image_size=(height, width)), manifest.readout)
            answers = model_answers(model, model_preprocess(model), layers=manifest.layers)(frames)
            assert dense.features.shape == (2, height // 16, width // 16, 7)
            for name, value in dense.outputs().items():
                bound = 2e-3 * np.abs(answers[name]).max()
                np.testing.assert_allclose(value, answers[name], rtol=2e-3, atol=bound, err_msg=name)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["value", "neighbour"])
def test_sixteen_bits_pass_their_gates(clip, tmp_path, precision, name):
    bundle = export(str(clip), tmp_path / "bundle", precision=precision, readout=name, project=True)
    backend = "onnxruntime-cpu" if precision == "fp16" else "openvino"
    pytest.importorskip(backend.partition("-")[0])
    with FeatureExtractor.load(bundle.folder, backend, examine=False) as extractor:
        parity, _ = judge_exam(bundle, extractor.run, extractor.backend, extractor.compute)
    assert not missed_gates(parity, precision)
    assert parity.cosine_p1 > 0.99


@pytest.mark.parametrize("name", ["value", "neighbour"])
def test_eight_bits_reach_the_last_block(clip, tmp_path, photos, name):
    full = export(str(clip), tmp_path / "full", readout=name)
    calibrate(full.folder, photos, tmp_path / "int8", float_macs=0.0)
    bundle = Bundle.read(tmp_path / "int8")
    graph = onnx.load(bundle.folder / "model.onnx").graph
    in_eight_bits = {
        i.name for i in graph.initializer if i.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    }
    for layer in ("value", "proj"):
        assert any(weight.startswith(f"blocks.2.attn.{layer}.weight") for weight in in_eight_bits), sorted(
            in_eight_bits
        )
    assert bundle.manifest.readout == Readout(name)
    with FeatureExtractor.load(bundle.folder, "onnxruntime-cpu") as extractor:
        assert extractor.dense(np.zeros((1, 64, 64, 3), np.uint8)).features.shape == (1, 4, 4, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "values"}, "readout: got 'values', expected final, value or neighbour"),
        ({"readout": "value", "layers": "3"}, "layers: got 3, the last block, with the readout value"),
        ({"readout": "value", "attention": True}, "attention: the readout value does not compute"),
    ],
)
def test_what_a_readout_does_not_serve_is_refused(clip, tmp_path, options, message):
    with pytest.raises(PhregError, match=message):
        export(str(clip), tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def test_a_manifest_without_the_readout_means_the_final_tokens(bundle):
    document = json.loads((bundle / "manifest.json").read_text())
    assert "readout" not in document
    assert read_manifest(document).readout == Readout()
    for readout in ({"name": "values", "project": False}, {"name": "value", "project": 1}, {"name": "value"}, "value"):
        with pytest.raises(PhregError, match=r"[Rr]eadout"):
            read_manifest({**document, "readout": readout})


# Students


def test_a_student_of_clip_keeps_its_readout(clip, photos, tmp_path):
    base = save(small("clip-quickgelu", depth=3), tmp_path / "base")
    command = ("distill", base, "--recipe", "ph-reg-clip", "--epochs", "1", "--batch", "4", "--views", "3")
    done = invoke(*command, "--images", photos, "-o", tmp_path / "student", "--cache", tmp_path / "cache", "--json")
    assert done.code == 0, done.stderr
    record = json.loads((tmp_path / "student" / "phreg.json").read_text())
    assert record["readout"] == {"name": "value", "project": True}
    assert record["recipe"]["teacher"] == "neighbour"
    assert record["registers"] == 16
    assert record["scores"]["student"]["fidelity"]["mean"] > record["scores"]["base"]["fidelity"]["mean"]
    student, source = load_model(str(tmp_path / "student")).state_dict(), load_model(str(base)).state_dict()
    changed = [name for name in source if name in student and not torch.equal(student[name], source[name])]
    moved = {name.split(".")[1] for name in changed if name.startswith("blocks.")}
    assert moved == {"1", "2"}
    assert torch.equal(student["head.weight"], source["head.weight"])
    # The bundle, the check and the scores of artifacts follow the record.
    bundle = tmp_path / "bundle"
    assert invoke("export", tmp_path / "student", "-o", bundle).code == 0
    assert Bundle.read(bundle).manifest.readout == Readout("value", True)
    checked = ("check", bundle, "--reference", tmp_path / "student", "--base", base, "--images", photos, "--json")
    assert invoke(*checked).code == 0
    own = invoke("artifacts", tmp_path / "student", "--images", photos, "--json").document
    served = invoke("artifacts", bundle, "--images", photos, "--json").document
    assert own["norm_outliers"]["median"] == pytest.approx(served["norm_outliers"]["median"], rel=1e-3)
    plain = invoke("artifacts", tmp_path / "student", "--images", photos, "--readout", "final", "--json").document
    assert plain["norm_outliers"]["median"] != pytest.approx(own["norm_outliers"]["median"], rel=1e-2)


def test_what_cannot_be_distilled_is_refused_before_work(clip, photos, tmp_path):
    base = save(small("clip-quickgelu"), tmp_path / "base")
    plain = save(small("augreg"), tmp_path / "plain")
    command = ("--images", photos, "-o", tmp_path / "student", "--json")
    invoke("distill", base, *command, "--readout", "values").refused(2, "readout: got 'values'")
    invoke("distill", base, *command, "--readout", "value", "--int8-aware").refused(2, "int8-aware: got the readout")
    invoke("distill", plain, *command, "--recipe", "ph-reg-clip").refused(2, "project:")
    assert not list(tmp_path.glob("student*"))


@pytest.mark.parametrize("family", ["siglip", "perception"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_pooling_head_projects_each_token_alone(family, precision, photos, tmp_path):
    """The bundle against timm's own pooling head, which is given one token at a time."""
    model = small(family, seed=4)
    if family == "siglip":
        # timm's SigLIP has no layer after the pooling head.
        model.reset_classifier(0)
    folder, steps = save(model, tmp_path / family), model_preprocess(model)
    bundle = export(str(folder), tmp_path / "bundle", readout="value", project=True)
    if precision == "int8":
        calibrate(tmp_path / "bundle", photos, tmp_path / "int8", cosine_p1=0.5)
        bundle = Bundle.read(tmp_path / "int8")
    with FeatureExtractor.load(bundle.folder, "onnxruntime-cpu") as extractor:
        image = extractor.prepare(photos / "frame-03.jpg")
        dense = extractor.dense(image[None])
    answer = model_answers(with_readout(model, Readout("value")), steps, "cpu")(image[None])
    with torch.no_grad():
        tokens = torch.from_numpy(answer["features"]).reshape(-1, 1, model.embed_dim)
        expected = model.head(model.attn_pool(tokens)).reshape(*answer["features"].shape[:3], -1).numpy()
    assert dense.features.shape == expected.shape
    lengths = np.linalg.norm(dense.features, axis=-1) * np.linalg.norm(expected, axis=-1)
    cosines = (dense.features * expected).sum(-1) / lengths
    assert cosines.min() > (0.99999 if precision == "fp32" else 0.98)
    readout, names = bundle.manifest.readout, {node.name for node in onnx.load(bundle.graph).graph.node}
    assert readout == Readout("value", True)
    assert any(name.startswith("project.") for name in names)
