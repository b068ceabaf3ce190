import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.errors import PhregError
from phreg_deploy.export import export
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.export.exam import at_size
from phreg_deploy.export.folding import patch_positions
from phreg_deploy.export.rotary import describe_rotary
from phreg_deploy.export.trace import OPSET, trace
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import model_preprocess
from phreg_deploy.models.registers import add_registers
from phreg_deploy.onnx_graph.mixed_precision import narrow
from phreg_deploy.runtime.positions import resample
from phreg_deploy.runtime.rotary import rotary_table
from phreg_deploy.spec import Batches, Sizes
from tests.small_models import FAMILIES, small


def run_both(model, images, *, sizes=None, batch="1", precision="fp32", keep=()):
    """Run uint8 images through ONNX Runtime and PyTorch; return both outputs and the graph."""
    patch = tuple(model.patch_embed.patch_size)
    sizes = sizes or Sizes("fixed", (tuple(images.shape[1:3]),))
    preprocess = model_preprocess(model)
    positions, rotary = patch_positions(model), describe_rotary(model)
    grid = None if positions is None else positions.reshape(*model.patch_embed.grid_size, -1).numpy()
    sized = model
    if tuple(model.patch_embed.img_size) != sizes.default:
        sized.set_input_size(img_size=sizes.default)
    traced = trace(DenseViT(sized, preprocess, positions_as_input=sizes.dynamic), sizes, Batches.parse(batch))
    proto = traced.model
    if precision != "fp32":
        traced.observe(torch.from_numpy(images))
        narrow(proto, precision, traced.largest, keep)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"image": images}
    if sizes.dynamic:
        cells = tuple(s // p for s, p in zip(images.shape[1:3], patch))
        if grid is not None:
            feed["pos_embed"] = resample(grid, cells)
        if rotary is not None:
            feed["rotary"] = rotary_table(rotary[0], rotary[1].numpy(), cells)
    names = [o.name for o in session.get_outputs()]
    got = dict(zip(names, session.run(None, feed)))
    if tuple(sized.patch_embed.img_size) != tuple(images.shape[1:3]):
        sized.set_input_size(img_size=tuple(images.shape[1:3]))
    with torch.no_grad():
        expected = hooks.forward(sized, hooks.normalise(images, preprocess.mean, preprocess.std))
    return got, expected, proto


def random_images(batch, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_as_pytorch_computes_it(family, registers):
    model = small(family)
    if registers:
        model = add_registers(model, registers)
    images = random_images(1, tuple(model.patch_embed.img_size))
    got, expected, _ = run_both(model, images)
    patches = expected.patches.numpy()
    assert agreement(got["features"].reshape(patches.shape), patches).minimum > 0.999999
    np.testing.assert_allclose(
        got["features"].reshape(patches.shape), patches, rtol=1e-3, atol=2e-4 * np.abs(patches).max()
    )
    np.testing.assert_allclose(got["token_norm"].reshape(expected.norms.shape), expected.norms.numpy(), rtol=1e-4)
    assert ("cls" in got) == (model.cls_token is not None)
    if "cls" in got:
        np.testing.assert_allclose(got["cls"], expected.cls.numpy(), rtol=1e-3, atol=2e-4 * np.abs(patches).max())


@pytest.mark.parametrize(
    "family", ["dinov2", "clip-quickgelu", "siglip", "eva", "eva02", "dinov3", "perception", "rope-mixed", "aimv2"]
)
@pytest.mark.parametrize(("size", "batch"), [((4, 4), 1), ((3, 6), 2), ((7, 5), 4)])
def test_one_graph_serves_a_range_of_sizes_and_batches(family, size, batch):
    model = add_registers(small(family), 4)
    patch = model.patch_embed.patch_size[0]
    sizes = Sizes.parse(f"{2 * patch}:{4 * patch}:{9 * patch}", (patch, patch))
    images = random_images(batch, tuple(patch * s for s in size))
    got, expected, _ = run_both(model, images, sizes=sizes, batch="1:2:8")
    assert got["features"].shape == (batch, *size, 48)
    assert agreement(got["features"].reshape(batch, -1, 48), expected.patches.numpy()).minimum > 0.999999


@pytest.mark.parametrize(("sizes", "batches"), [("fixed", "1:2:8"), ("range", "1")])
def test_torch_2_9_is_refused_for_a_range(monkeypatch, sizes, batches):
    """https://github.com/pytorch/pytorch/issues/172903: torch's own error is ``name 'L' is not defined``."""
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    sizes = {"fixed": Sizes("fixed", ((56, 56),)), "range": Sizes.parse("28:56:126", (14, 14))}[sizes]
    with pytest.raises(PhregError, match=r"torch 2\.9\.1\+cu128 cannot trace a range"):
        run_both(small("dinov2"), random_images(1, (56, 56)), sizes=sizes, batch=batches)


def test_rotary_models_are_served_at_sizes_that_are_not_square():
    model = add_registers(small("eva02"), 4)
    got, expected, _ = run_both(model, random_images(1, (42, 70)))
    assert agreement(got["features"].reshape(1, -1, 48), expected.patches.numpy()).minimum > 0.999999


@pytest.mark.parametrize(
    "family",
    ["dinov2", "clip-quickgelu", "siglip", "eva02", "dinov3", "perception", "rope-mixed", "aimv2", "sapiens2"],
)
def test_float16_graphs_stay_close(family):
    model = add_registers(small(family), 4)
    got, expected, proto = run_both(model, random_images(1, tuple(model.patch_embed.img_size)), precision="fp16")
    assert got["features"].dtype == np.float16
    assert got["token_norm"].dtype == np.float32
    assert agreement(got["features"].reshape(1, -1, 48), expected.patches.numpy()).p1 > 0.999
    weights = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT16]
    assert len(weights) > 20


@pytest.mark.parametrize("family", ["dinov3", "aimv2", "sapiens2"])
def test_the_final_norm_of_a_bfloat16_graph_is_computed_in_float32(family):
    """An RMS norm is several nodes, and none may be left in bfloat16."""
    model = small(family)
    sizes = Sizes("fixed", (tuple(model.patch_embed.img_size),))
    graph = trace(DenseViT(model, model_preprocess(model)), sizes, Batches.parse("1")).model
    narrow(graph, "bf16", {})
    onnx.checker.check_model(graph)
    assert {v.type.tensor_type.elem_type for v in graph.graph.output} == {onnx.TensorProto.FLOAT}
    narrowed = {i.name for i in graph.graph.initializer if i.data_type == onnx.TensorProto.BFLOAT16}
    inputs = {name for node in graph.graph.node if node.name.startswith("norm/") for name in node.input}
    assert inputs
    assert not inputs & narrowed


def test_the_graph_has_no_superfluous_nodes():
    _, _, proto = run_both(add_registers(small("dinov2"), 4), random_images(1, (56, 56)))
    operators = [node.op_type for node in proto.graph.node]
    assert proto.opset_import[0].version == OPSET
    assert operators.count("MatMul") == 1 + 2 * 6
    assert operators.count("LayerNormalization") == 2 * 2 + 2
    assert operators.count("Gelu") == operators.count("Softmax") == 2
    assert not {"Resize", "Expand", "Where", "If", "Erf", "Conv", "Identity"} & set(operators)
    assert operators.count("Cast") == 1


def test_the_same_weights_give_the_same_bytes_and_no_trace_of_the_machine():
    texts = []
    for _ in range(2):
        _, _, proto = run_both(add_registers(small("clip"), 4), random_images(1, (64, 64)))
        texts.append(proto.SerializeToString(deterministic=True))
    assert texts[0] == texts[1]
    for word in (b"/home", b"/work", b"/root", b"site-packages", b"stack_trace", b".py"):
        assert word not in texts[0]


def test_importing_the_function_imports_nothing_heavy():
    code = "import sys, phreg_deploy.export; print(*{'torch', 'timm', 'onnx', 'numpy', 'tensorrt'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"precision": "int8"}, "got int8, which `phreg-deploy calibrate` makes from an fp32 bundle"),
        ({"precision": "fp64"}, "got 'fp64', expected fp32"),
        ({"keep_fp32": ["blocks"]}, "with --precision fp32 everything does"),
        ({"batch": "many"}, "got 'many', expected one number"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, words):
    with pytest.raises(PhregError, match=words):
        export("vit_tiny_patch16_224", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["dinov2", "eva02", "rope-mixed"])
def test_another_size_shares_the_weights_and_leaves_the_model_as_it_was(family):
    model = small(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        wanted = model.forward_features(images)
        patch = model.patch_embed.patch_size[0]
        sized = at_size(model, (3 * patch, 6 * patch))
        DenseViT(sized, model_preprocess(model))
        torch.testing.assert_close(model.forward_features(images), wanted, rtol=0, atol=0)
    assert sized.blocks[0].mlp.fc2.weight is model.blocks[0].mlp.fc2.weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
