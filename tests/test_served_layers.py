"""Further layers and the class token's attention: what a graph returns, against timm and an independent computation."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm.layers import apply_rot_embed_cat

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.errors import PhregError
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.export.exam import at_size
from phreg_deploy.export.folding import patch_positions
from phreg_deploy.export.rotary import describe_rotary
from phreg_deploy.export.trace import trace
from phreg_deploy.layers import Layers, check_layers, parse_layers
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import model_preprocess
from phreg_deploy.models.registers import add_registers
from phreg_deploy.onnx_graph.mixed_precision import narrow
from phreg_deploy.runtime.positions import resample
from phreg_deploy.runtime.rotary import rotary_table
from phreg_deploy.spec import Batches, Sizes
from tests.small_models import small

BLOCKS = (1, 3, 4)
WITH_CLASS = ["augreg", "dinov2", "clip-quickgelu", "eva02", "dinov3", "rope-mixed"]


def random_images(batch, size):
    return np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


def serve(model, images, *, sizes=None, precision="fp32", norm=True, attention=False):
    """The outputs of a graph with ``BLOCKS`` in ONNX Runtime, by name."""
    patch, preprocess = tuple(model.patch_embed.patch_size), model_preprocess(model)
    sizes = sizes or Sizes("fixed", (tuple(images.shape[1:3]),))
    module = DenseViT(
        at_size(model, sizes.default),
        preprocess,
        positions_as_input=sizes.dynamic,
        layers=Layers(BLOCKS, norm),
        attention=attention,
    )
    traced = trace(module, sizes, Batches.parse("1:2:4" if sizes.dynamic else str(len(images))))
    if precision != "fp32":
        traced.observe(torch.from_numpy(images))
        narrow(traced.model, precision, traced.largest)
    onnx.checker.check_model(traced.model)
    feed = {"image": images}
    if sizes.dynamic:
        cells = tuple(side // p for side, p in zip(images.shape[1:3], patch))
        positions, rotary = patch_positions(model), describe_rotary(model)
        if positions is not None:
            grid = positions.reshape(*model.patch_embed.grid_size, -1).numpy()
            feed["pos_embed"] = resample(grid, cells)
        if rotary is not None:
            feed["rotary"] = rotary_table(rotary[0], rotary[1].numpy(), cells)
    session = onnxruntime.InferenceSession(traced.model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed)))


@torch.no_grad()
def intermediates(model, images, norm):
    """timm's own patch tokens ``(B, N, C)`` and prefix tokens of ``BLOCKS``.

    Of a model that has only ``fc_norm``, timm normalises none; bundles apply it to every token, as to ``features``.
    """
    preprocess = model_preprocess(model)
    pooled = norm and model.norm is not hooks.final_norm(model)
    found = model.forward_intermediates(
        hooks.normalise(images, preprocess.mean, preprocess.std),
        indices=[block - 1 for block in BLOCKS],
        return_prefix_tokens=True,
        norm=norm,
        output_fmt="NLC",
        intermediates_only=True,
    )
    if not model.num_prefix_tokens:
        return [(patches, None) for patches in found]
    return [(model.fc_norm(patches), model.fc_norm(prefix)) for patches, prefix in found] if pooled else found


def compare(got, model, images, norm):
    expected, raw = intermediates(model, images, norm), intermediates(model, images, False)
    for block, (patches, prefix), (unnormed, _) in zip(BLOCKS, expected, raw):
        features = got[f"features.{block}"]
        grid = tuple(side // p for side, p in zip(images.shape[1:3], model.patch_embed.patch_size))
        assert features.shape == (len(images), *grid, 48)
        assert agreement(features.reshape(len(images), -1, 48), patches.numpy()).minimum > 0.999999
        scale = np.abs(patches.numpy()).max()
        np.testing.assert_allclose(features.reshape(patches.shape), patches.numpy(), rtol=1e-3, atol=3e-4 * scale)
        norms = unnormed.norm(dim=-1).numpy().reshape(got[f"token_norm.{block}"].shape)
        np.testing.assert_allclose(got[f"token_norm.{block}"], norms, rtol=1e-4)
        assert (f"cls.{block}" in got) == (model.cls_token is not None)
        if model.cls_token is not None:
            np.testing.assert_allclose(got[f"cls.{block}"], prefix[:, 0].numpy(), rtol=1e-3, atol=3e-4 * scale)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", ["augreg", "dinov2", "clip-quickgelu", "siglip", "eva", "dinov3", "rope-mixed"])
def test_layers_are_those_of_timm(family, norm):
    model = add_registers(small(family, depth=4), 4)
    images = random_images(1, tuple(model.patch_embed.img_size))
    got = serve(model, images, norm=norm)
    compare(got, model, images, norm)
    if norm:
        np.testing.assert_array_equal(got["features.4"], got["features"])


@pytest.mark.parametrize("family", ["dinov2", "siglip", "dinov3"])
@pytest.mark.parametrize(("grid", "batch"), [((4, 4), 1), ((3, 6), 2), ((7, 5), 4)])
def test_layers_of_a_range_of_sizes_are_those_of_timm(family, grid, batch):
    model = small(family, depth=4)
    p = model.patch_embed.patch_size[0]
    sizes = Sizes("range", ((2 * p, 2 * p), (4 * p, 4 * p), (8 * p, 8 * p)))
    images = random_images(batch, tuple(p * side for side in grid))
    got = serve(model, images, sizes=sizes)
    compare(got, at_size(model, images.shape[1:3]), images, True)


@torch.no_grad()
def attend(model, images):
    """The class token's softmax over all keys in the last block, from the weights; ``(B, H, N)`` over the patches."""
    preprocess, seen = model_preprocess(model), []
    block = model.blocks[-1]
    handle = block.norm1.register_forward_hook(lambda _m, _i, out: seen.append(out))
    ropes = []
    block.attn.register_forward_pre_hook(lambda _m, _a, more: ropes.append(more.get("rope")), with_kwargs=True)
    model.forward_features(hooks.normalise(images, preprocess.mean, preprocess.std))
    handle.remove()
    attn, x, rope = block.attn, seen[0], ropes[0]
    if getattr(attn, "qkv", None) is not None:
        bias = attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])
        q, k, _ = torch.nn.functional.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
    else:
        q, k = attn.q_proj(x), attn.k_proj(x)
    q, k = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k))
    q, k = attn.q_norm(q), attn.k_norm(k)
    prefix = model.num_prefix_tokens
    if rope is not None:
        half = getattr(attn, "rotate_half", False)
        q, k = (
            torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half=half)], dim=2)
            for part in (q, k)
        )
    scores = torch.einsum("bhd,bhtd->bht", q[:, :, 0], k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True))[..., prefix:].numpy()


@pytest.mark.parametrize("family", WITH_CLASS)
def test_attention_is_the_softmax_of_the_class_token_over_all_keys(family):
    model = add_registers(small(family, depth=4), 4)
    images = random_images(2, tuple(model.patch_embed.img_size))
    got, plain = serve(model, images, attention=True), serve(model, images)
    expected = attend(model, images)
    assert got["attention"].shape == (2, 3, 4, 4)
    np.testing.assert_allclose(got["attention"].reshape(2, 3, 16), expected, rtol=2e-4, atol=1e-7)
    # The model's classes and registers take a part, and the heads differ.
    assert (expected.sum(-1) < 0.999).all()
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 1e-3
    assert set(got) - set(plain) == {"attention"}
    np.testing.assert_allclose(got["features"], plain["features"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("norm", [True, False])
def test_layers_and_attention_in_half_precision_stay_close(precision, norm):
    model = add_registers(small("dinov3", depth=4), 4)
    images = random_images(1, tuple(model.patch_embed.img_size))
    sizes = Sizes("fixed", (tuple(images.shape[1:3]),))
    layers = Layers(BLOCKS, norm)
    traced = trace(DenseViT(model, model_preprocess(model), layers=layers, attention=True), sizes, Batches.parse("1"))
    traced.observe(torch.from_numpy(images))
    narrow(traced.model, precision, traced.largest)
    kinds = {output.name: output.type.tensor_type.elem_type for output in traced.model.graph.output}
    assert {kinds[f"token_norm.{block}"] for block in BLOCKS} == {onnx.TensorProto.FLOAT}
    expected_kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT
    assert {kinds[name] for name in ("features.1", "cls.3", "attention")} == {expected_kind}
    if precision == "fp16":
        got = serve(model, images, precision="fp16", norm=norm, attention=True)
        for block, (patches, _) in zip(BLOCKS, intermediates(model, images, norm)):
            assert agreement(got[f"features.{block}"].reshape(1, -1, 48), patches.numpy()).p1 > 0.999
        np.testing.assert_allclose(got["attention"].reshape(1, 3, 16), attend(model, images), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "depth", "blocks"),
    [
        ("3,6,9,12", 12, (3, 6, 9, 12)),
        ("12, 3,3", 12, (3, 12)),
        ("1", 12, (1,)),
        ("all", 3, (1, 2, 3)),
        ("1/4,1/2,3/4,1", 12, (3, 6, 9, 12)),
        ("1/4,1/2,3/4,1", 24, (6, 12, 18, 24)),
        ("1/4,1/2,3/4,1", 40, (10, 20, 30, 40)),
        ("1/3,1/2", 4, (1, 2)),
        ("1/100,1", 4, (1, 4)),
    ],
)
def test_layers_are_named_by_blocks_fractions_or_all(text, depth, blocks):
    assert parse_layers(text, depth) == blocks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "got '0', expected numbers of blocks"),
        ("13", "got 13, expected numbers from 1 to 12: the model has 12 blocks"),
        ("3;6", "got '3;6'"),
        ("", "got ''"),
        ("-1", "got '-1'"),
        ("1/2,3", "each is at most 1"),
        ("3/2", "each is at most 1"),
        ("1/0", "got '1/0'"),
        ("4/4", "write 1 with a smaller fraction"),
    ],
)
def test_other_layers_are_refused(text, words):
    with pytest.raises(PhregError, match="layers: ") as error:
        parse_layers(text, 12)
    assert words in str(error.value)


def test_a_norm_without_layers_is_refused():
    check_layers(None)
    check_layers("3", norm=False)
    with pytest.raises(PhregError, match="--no-layer-norm without --layers"):
        check_layers(None, norm=False)
