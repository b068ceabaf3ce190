"""Models with rotary position embeddings, served over a range of sizes: sines and cosines are an input of the graph."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import PhregError
from phreg_deploy.export import export
from phreg_deploy.export.exam import at_size
from phreg_deploy.export.rotary import describe_rotary, rotary_tables
from phreg_deploy.export.rotation import paired_halves, rotate, wide_tables
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import model_preprocess
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.rotary import rotary_table
from tests.cli_helpers import ROOT, invoke
from tests.small_models import save, small

FAMILIES = ["eva02", "dinov3", "perception", "rope-mixed"]
# (rows, columns) of patches, none square.
GRIDS = [(2, 3), (5, 4), (3, 8), (9, 2), (7, 6)]


@pytest.fixture(scope="module", params=FAMILIES)
def ranged(request, tmp_path_factory):
    """A model, and its bundle for 2 to 9 patches a side and 1 to 4 images."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    return make("dinov3", tmp_path_factory.mktemp("dinov3"))


def make(family: str, folder: Path):
    model = small(family)
    patch = model.patch_embed.patch_size[0]
    sizes = f"{2 * patch}:{4 * patch}:{9 * patch}"
    export(str(save(model, folder / "model")), folder / "bundle", image_size=sizes, batch="1:2:4")
    return model, folder / "bundle"


def pictures(model, grid, count=2):
    rows, columns = (side * step for side, step in zip(grid, model.patch_embed.patch_size))
    return np.random.default_rng(grid[0]).integers(0, 256, (count, rows, columns, 3), dtype=np.uint8)


def expected(model, images):
    preprocess = model_preprocess(model)
    with torch.no_grad():
        sized = at_size(model, tuple(images.shape[1:3]))
        return hooks.forward(sized, hooks.normalise(images, preprocess.mean, preprocess.std))


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


# The manifest


def test_the_manifest_describes_the_embedding(dinov3):
    manifest = json.loads((dinov3[1] / "manifest.json").read_text())
    assert manifest["rotary"] == {
        "kind": "dinov3",
        "temperature": 100.0,
        "coordinates": "centered",
        "offset": 0.0,
        "reference": None,
        "layers": 1,
        "heads": 1,
        "pairs": 8,
    }
    assert manifest["inputs"]["rotary"] == {"dtype": "float32", "shape": [2, 1, 1, "N", 8]}
    assert "pos_embed" not in manifest["inputs"]
    assert np.load(dinov3[1] / "rotary.npy").shape == (2, 1, 1, 8)


def test_every_profile_has_shapes_for_the_table(dinov3):
    (one, full) = profiles_of(Bundle.read(dinov3[1]).manifest)
    shapes = [[2, 1, 1, count, 8] for count in (4, 16, 81)]
    assert one.inputs["rotary"] == full.inputs["rotary"] == shapes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coordinates": "polar"}, "rotary.coordinates 'polar', expected index or centered"),
        ({"layers": 3}, "rotary.layers 3, expected 1 or 2"),
        ({"heads": "many"}, "rotary.heads 'many', expected 1 or 3"),
        ({"pairs": 0}, "rotary.pairs 0, expected a whole number above 0"),
        ({"pairs": 9}, "inputs.rotary"),
        ({"offset": None}, "rotary.offset None, expected a number"),
        ({"reference": [0, 4]}, "expected two whole numbers above 0, or null"),
        ({"temperature": -1}, "expected a number above 0, or null"),
        ({"more": 1}, "Rotary: got the keys"),
    ],
)
def test_a_manifest_that_no_export_writes_is_refused(dinov3, tmp_path, change, words):
    folder = Path(shutil.copytree(dinov3[1], tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["rotary"].update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PhregError) as caught:
        Bundle.read(folder)
    assert words in str(caught.value)


def test_an_input_without_description_is_refused(dinov3, tmp_path):
    folder = Path(shutil.copytree(dinov3[1], tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "rotary": None}))
    with pytest.raises(PhregError, match="inputs"):
        Bundle.read(folder)


# Calibration


@pytest.mark.parametrize("family", ["dinov3", "perception"])
def test_a_range_of_sizes_is_calibrated(family, tmp_path, photos):
    from phreg_deploy.calibration import calibrate

    model, folder = make(family, tmp_path)
    report = calibrate(folder, photos, tmp_path / "eight", force=True)
    assert report.integer_layers == 2 * 4
    assert report.float_layers == []
    bundle = Bundle.read(tmp_path / "eight")
    bundle.verify()
    assert bundle.manifest.rotary == Bundle.read(folder).manifest.rotary
    with FeatureExtractor.load(tmp_path / "eight", backend="onnxruntime-cpu") as extractor:
        for grid in GRIDS[:3]:
            images = pictures(model, grid)
            patches = extractor.run(images)["features"].reshape(2, -1, 48)
            assert agreement(patches, expected(model, images).patches.numpy()).mean > 0.99


# Engines that compute something else


def zeroed(_name, values):
    return np.zeros_like(values)


def unlike(_name, values):
    """Answers at a cosine of about 0, as TensorRT 10.4 gave for DINOv3 ViT-B/16 in FP32 (NVIDIA/TensorRT#4742)."""
    return np.random.default_rng(0).standard_normal(values.shape).astype(values.dtype) * np.abs(values).mean()


def nothing(_name, values):
    """The same in FP16."""
    return np.full_like(values, np.nan)


def misplaced(name, values):
    """Positions at the wrong patches, as on Orin with 10.3 (NVIDIA/TensorRT#4558): the features of each row shifted."""
    return np.roll(values, 1, axis=2) if values.ndim > 2 else values


@pytest.mark.parametrize("answer", [unlike, nothing, misplaced, zeroed])
def test_the_exam_refuses_an_engine_that_was_miscompiled(dinov3, tmp_path, workshop, answer):
    folder = Path(shutil.copytree(dinov3[1], tmp_path / "bundle"))
    sound = invoke("build", folder, "--json")
    assert sound.code == 0, sound.err
    shutil.rmtree(folder / "engines")
    workshop.answer = answer
    done = invoke("build", folder, "--json")
    done.refused(3, "parity:", "The engine was not kept")
    assert not list((folder / "engines").glob("*.plan"))


def test_an_engine_that_does_not_turn_the_queries_is_refused(tmp_path, workshop):
    """A fixed size has its cosines as constants; without them every patch token is a query and a key of zeros."""
    bundle = export(str(save(small("dinov3"), tmp_path / "model")), tmp_path / "bundle")
    assert invoke("build", bundle.folder, "--json").code == 0
    shutil.rmtree(bundle.folder / "engines")
    workshop.spoiled = "turns.0"
    invoke("build", bundle.folder, "--json").refused(3, "parity:", "The engine was not kept")
