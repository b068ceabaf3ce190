"""Bundles with a rotary embedding as an input: the manifest, calibration, and engines that compute it wrongly."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from phreg_deploy.artifacts.measures import agreement
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import PhregError
from phreg_deploy.export import export
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.feed import InputFeed
from phreg_deploy.spec import Sizes
from tests.cli_helpers import invoke
from tests.rotary_models import GRIDS, expected, make, pictures
from tests.small_models import save, small


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    return make("dinov3", tmp_path_factory.mktemp("dinov3"))


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


def test_fewer_grids_are_kept_where_every_head_has_a_table(dinov3, tmp_path):
    _, folder = make("rope-mixed", tmp_path)
    feed = InputFeed(Bundle.read(folder))
    (table,) = [value for name, value in feed.others((128, 144)).items() if name == "rotary"]
    assert table.nbytes == 8 * 2 * 3 * 8 * 72
    assert InputFeed(Bundle.read(dinov3[1]))._grids() == feed._grids() == 16
    manifest = dataclasses.replace(feed.manifest, sizes=Sizes("range", ((32, 32), (64, 64), (16384, 1024))))
    feed.manifest = manifest
    assert feed._grids() == (1 << 28) // (8 * 2 * 3 * 8 * 1024 * 64)


def test_a_table_that_no_device_should_hold_is_refused_before_tracing(tmp_path):
    folder = save(small("rope-mixed", depth=12, width=384, heads=6), tmp_path / "model")
    with pytest.raises(
        PhregError, match=r"up to 4096x4096, .* bytes of sines and cosines; expected at most 1073741824"
    ):
        export(str(folder), tmp_path / "bundle", image_size="224:512:4096")


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
def test_the_exam_refuses_an_engine_that_was_miscompiled(dinov3, tmp_path, tensorrt, answer):
    folder = Path(shutil.copytree(dinov3[1], tmp_path / "bundle"))
    sound = invoke("build", folder, "--json")
    assert sound.code == 0, sound.err
    shutil.rmtree(folder / "engines")
    tensorrt.answer = answer
    done = invoke("build", folder, "--json")
    done.refused(3, "parity:", "The engine was not kept")
    assert not list((folder / "engines").glob("*.plan"))


def test_an_engine_that_does_not_turn_the_queries_is_refused(tmp_path, tensorrt):
    """A fixed size has its cosines as constants; without them every patch token is a query and a key of zeros."""
    bundle = export(str(save(small("dinov3"), tmp_path / "model")), tmp_path / "bundle")
    assert invoke("build", bundle.folder, "--json").code == 0
    shutil.rmtree(bundle.folder / "engines")
    tensorrt.zeroed_weights = "turns.0"
    invoke("build", bundle.folder, "--json").refused(3, "parity:", "The engine was not kept")


def test_a_list_of_sizes_has_a_profile_for_each(tmp_path):
    model = small("perception")
    bundle = export(str(save(model, tmp_path / "model")), tmp_path / "bundle", image_size="32x48,80x64")
    shapes = [profile.inputs["rotary"] for profile in profiles_of(bundle.manifest)]
    assert shapes == [[[2, 1, 1, count, 8]] * 3 for count in (6, 20)]
    with FeatureExtractor.load(bundle.folder, backend="onnxruntime-cpu") as extractor:
        for grid in ((2, 3), (5, 4)):
            images = pictures(model, grid, 1)
            patches = extractor.run(images)["features"].reshape(1, -1, 48)
            assert agreement(patches, expected(model, images).patches.numpy()).minimum > 0.999999
        with pytest.raises(PhregError, match="got 48x64, expected 32x48 or 80x64"):
            extractor.run(pictures(model, (3, 4), 1))
