"""Models with rotary position embeddings, served over a range of sizes: sines and cosines are an input of the graph."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.export import export
from phreg_deploy.export.exam import at_size
from phreg_deploy.export.rotary import describe_rotary, rotary_tables
from phreg_deploy.export.rotation import paired_halves, rotate, wide_tables
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.rotary import rotary_table
from tests.cli_helpers import ROOT, invoke
from tests.rotary_models import GRIDS, expected, make, pictures
from tests.small_models import save, small

FAMILIES = ["eva02", "dinov3", "perception", "rope-mixed"]


@pytest.fixture(scope="module", params=FAMILIES)
def ranged(request, tmp_path_factory):
    """A model, and its bundle for 2 to 9 patches a side and 1 to 4 images."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    return make("dinov3", tmp_path_factory.mktemp("dinov3"))


# The table


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in [*FAMILIES, "sapiens2"]),
        ("eva02", {"rope_type": "mrope", "width": 96, "heads": 2}),
        ("eva02", {"ref_feat_shape": (3, 7), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"}),
        ("dinov3", {"rope_grid_offset": 0.25, "rope_grid_indexing": "xy"}),
        ("dinov3", {"dynamic_img_size": False}),
        ("eva02", {"dynamic_img_size": True}),
    ],
)
def test_the_table_is_timms(family, options, grid):
    """Angles reach 9 radians here, so float32 alone differs by about 1e-6."""
    model = small(family, depth=1, **options)
    model = at_size(model, tuple(s * p for s, p in zip(grid, model.patch_embed.patch_size)))
    facts, frequencies = describe_rotary(model)
    got = rotary_table(facts, frequencies.numpy(), grid)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, rotary_tables(model).numpy(), atol=3e-6)


@pytest.mark.parametrize("half", [True, False])
def test_one_way_of_pairing_serves_both_of_timms(half):
    """Scores of queries and keys with reordered channels are those of timm's rotation."""
    torch.manual_seed(0)
    heads, width, tokens, prefix = 3, 8, 6, 2
    weights, x = torch.randn(2, heads * width, 5), torch.randn(1, tokens, 5)
    angles = torch.randn(tokens - prefix, width // 2)
    wide = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
    table = torch.cat([wide.sin(), wide.cos()], -1)

    def parts(weight):
        return (x @ weight.T).reshape(1, tokens, heads, width).transpose(1, 2)

    q, k = (
        torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], table, half=half)], 2)
        for part in map(parts, weights)
    )
    cosines, sines = wide_tables(torch.stack([angles.sin(), angles.cos()])[:, None, None], prefix)
    reordered = weights if half else [paired_halves(weight, heads) for weight in weights]
    got_q, got_k = (rotate(parts(weight), (cosines[0], sines[0])) for weight in reordered)
    torch.testing.assert_close(got_q @ got_k.mT, q @ k.mT)


# The bundle


def test_one_bundle_serves_five_sizes_as_timm_does(ranged):
    model, folder = ranged
    with FeatureExtractor.load(folder, backend="onnxruntime-cpu") as extractor:
        for grid in GRIDS:
            images = pictures(model, grid)
            got, wanted = extractor.run(images), expected(model, images)
            patches = got["features"].reshape(2, -1, 48)
            assert agreement(patches, wanted.patches.numpy()).minimum > 0.999999
            np.testing.assert_allclose(got["token_norm"].reshape(2, -1), wanted.norms.numpy(), rtol=1e-4)
            np.testing.assert_allclose(got["cls"], wanted.cls.numpy(), atol=1e-3)


def test_openvino_serves_the_same(dinov3):
    pytest.importorskip("openvino")
    model, folder = dinov3
    with FeatureExtractor.load(folder, backend="openvino", compute="fp32") as extractor:
        for grid in GRIDS[:3]:
            images = pictures(model, grid)
            patches = extractor.run(images)["features"].reshape(2, -1, 48)
            assert agreement(patches, expected(model, images).patches.numpy()).minimum > 0.99999


def test_the_bundle_passes_its_own_exam(ranged):
    done = invoke("check", ranged[1], "--backend", "onnxruntime-cpu", "--json")
    assert done.code == 0, done.err


def test_no_torch_is_needed(dinov3):
    folder = dinov3[1]
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "timm", "onnx", "safetensors")))
import numpy
from phreg_deploy.runtime import FeatureExtractor
images = numpy.zeros((1, 48, 112, 3), numpy.uint8)
print(FeatureExtractor.load({str(folder)!r}, backend="onnxruntime-cpu").run(images)["features"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "(1, 3, 7, 48)", done.stderr[-2000:]


def test_the_graph_has_no_trigonometry_and_nothing_that_the_parser_stumbles_over(ranged):
    """A traced rotation leaves Tile and If (NVIDIA/TensorRT#4558)."""
    graph = onnx.load(ranged[1] / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert not {"Sin", "Cos", "Tile", "If", "Range", "Loop", "Resize", "ScatterND"} & kinds
    assert {value.name for value in graph.input} >= {"image", "rotary"}


def test_a_fixed_size_needs_no_further_input(tmp_path):
    model = small("dinov3")
    bundle = export(str(save(model, tmp_path / "model")), tmp_path / "bundle", image_size="48x80")
    assert list(bundle.manifest.inputs) == ["image"]
    assert bundle.manifest.rotary is None
    assert not (bundle.folder / "rotary.npy").exists()
    images = pictures(model, (3, 5), 1)
    with FeatureExtractor.load(bundle.folder, backend="onnxruntime-cpu") as extractor:
        patches = extractor.run(images)["features"].reshape(1, -1, 48)
    assert agreement(patches, expected(model, images).patches.numpy()).minimum > 0.999999


def test_half_precision_stays_close_at_every_size(tmp_path):
    model = small("dinov3")
    folder = save(model, tmp_path / "model")
    bundle = export(str(folder), tmp_path / "half", image_size="32:64:144", precision="fp16")
    with FeatureExtractor.load(bundle.folder, backend="onnxruntime-cpu") as extractor:
        for grid in GRIDS:
            images = pictures(model, grid, 1)
            patches = extractor.run(images)["features"].reshape(1, -1, 48)
            assert agreement(patches, expected(model, images).patches.numpy()).p1 > 0.999
