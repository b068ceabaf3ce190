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
from phreg_deploy.export.folding import patch_positions
from phreg_deploy.export.trace import OPSET, trace
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import model_preprocess
from phreg_deploy.models.registers import add_registers
from phreg_deploy.onnx_graph.mixed_precision import narrow
from phreg_deploy.runtime.positions import resample
from phreg_deploy.spec import Batches, Sizes
from tests.small_models import FAMILIES, small


def run_both(model, images, *, sizes=None, batch="1", precision="fp32", keep=()):
    """Run uint8 images through ONNX Runtime and PyTorch; return both outputs and the graph."""
    patch = tuple(model.patch_embed.patch_size)
    sizes = sizes or Sizes("fixed", (tuple(images.shape[1:3]),))
    preprocess = model_preprocess(model)
    positions = patch_positions(model)
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
        feed["pos_embed"] = resample(grid, tuple(s // p for s, p in zip(images.shape[1:3], patch)))
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


@pytest.mark.parametrize("family", ["dinov2", "clip-quickgelu", "siglip", "eva"])
@pytest.mark.parametrize(("size", "batch"), [((4, 4), 1), ((3, 6), 2), ((7, 5), 4)])
def test_one_graph_serves_a_range_of_sizes_and_batches(family, size, batch):
    model = add_registers(small(family), 4)
    patch = model.patch_embed.patch_size[0]
    sizes = Sizes.parse(f"{2 * patch}:{4 * patch}:{9 * patch}", (patch, patch))
    images = random_images(batch, tuple(patch * s for s in size))
    got, expected, _ = run_both(model, images, sizes=sizes, batch="1:2:8")
    assert got["features"].shape == (batch, *size, 48)
    assert agreement(got["features"].reshape(batch, -1, 48), expected.patches.numpy()).minimum > 0.999999


def test_rotary_models_are_served_at_sizes_that_are_not_square():
    model = add_registers(small("eva02"), 4)
    got, expected, _ = run_both(model, random_images(1, (42, 70)))
    assert agreement(got["features"].reshape(1, -1, 48), expected.patches.numpy()).minimum > 0.999999


@pytest.mark.parametrize("family", ["dinov2", "clip-quickgelu", "siglip", "eva02"])
def test_float16_graphs_stay_close(family):
    model = add_registers(small(family), 4)
    got, expected, proto = run_both(model, random_images(1, tuple(model.patch_embed.img_size)), precision="fp16")
    assert got["features"].dtype == np.float16
    assert got["token_norm"].dtype == np.float32
    assert agreement(got["features"].reshape(1, -1, 48), expected.patches.numpy()).p1 > 0.999
    weights = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT16]
    assert len(weights) > 20


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
