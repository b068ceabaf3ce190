"""Bundles with further layers and attention: manifest, runtime, exam, INT8, engines and extracted files."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from phreg_deploy.artifacts.measures import agreement, norm_outliers
from phreg_deploy.artifacts.parity import Parity, ParityAccumulator
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.calibration import calibrate
from phreg_deploy.calibration.search import EvalSet, compare, run_session
from phreg_deploy.errors import PhregError
from phreg_deploy.export import export
from phreg_deploy.extraction.inputs.sources import find_images
from phreg_deploy.extraction.task import parse_outputs
from phreg_deploy.models.answers import model_answers
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import judge_exam, missed_gates
from tests.broken_bundles import BrokenBundle, scale_outputs
from tests.bundle_changes import rewrite_bundle
from tests.cli_helpers import invoke
from tests.small_models import save, small

BACKENDS = ["onnxruntime-cpu", "openvino"]
OF_LAYER = {"features", "cls", "token_norm"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(small("dinov3", depth=6), tmp_path_factory.mktemp("layers") / "model")


@pytest.fixture(scope="module")
def layered(model):
    """Layers 2, 4 and 6 of six, attention, 64 x 64 pixels, one or two images."""
    return export(str(model), model.parent / "bundle", layers="1/3,2/3,1", attention=True, batch="1:1:2").folder


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(5).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def test_the_manifest_lists_the_layers(layered):
    manifest = json.loads((layered / "manifest.json").read_text())
    assert manifest["layers"] == {"blocks": [2, 4, 6], "norm": True}
    named = OF_LAYER | {f"{kind}.{block}" for kind in OF_LAYER for block in (2, 4, 6)} | {"attention"}
    assert set(manifest["outputs"]) == named
    assert manifest["outputs"]["features.4"] == {"dtype": "float32", "shape": ["B", 4, 4, 48]}
    assert manifest["outputs"]["cls.4"] == {"dtype": "float32", "shape": ["B", 48]}
    assert manifest["outputs"]["token_norm.4"] == {"dtype": "float32", "shape": ["B", 4, 4]}
    assert manifest["outputs"]["attention"] == {"dtype": "float32", "shape": ["B", 3, 4, 4]}
    with np.load(layered / "reference.npz") as exam:
        assert {name.partition("/")[2] for name in exam} == named | {"image"}


def test_a_bundle_without_layers_has_no_new_key(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert "layers" not in manifest
    assert set(manifest["outputs"]) == OF_LAYER
    assert Bundle.read(bundle).manifest.layers is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_runtime_returns_layers_by_number(layered, model, frames, backend):
    pytest.importorskip(backend.partition("-")[0])
    torch_model = load_model(str(model))
    layers = Bundle.read(layered).manifest.layers
    expected = model_answers(torch_model, model_preprocess(torch_model), layers=layers, attention=True)(frames)
    with FeatureExtractor.load(layered, backend=backend, compute="fp32") as extractor:
        dense = extractor.dense(frames)
    assert list(dense.layers) == [2, 4, 6]
    assert set(dense.outputs()) == set(expected)
    for name, value in dense.outputs().items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=2e-3 * np.abs(expected[name]).max())
    four = dense.layers[4]
    assert agreement(four.features, expected["features.4"]).minimum > 0.99999
    assert np.abs(four.features - dense.features).max() > 0.1
    rates = [norm_outliers(expected["token_norm.4"][i]).rate for i in range(3)]
    np.testing.assert_allclose(four.artifact_rate, rates)


def test_layers_without_the_norm_are_the_residual_stream(model, tmp_path, frames):
    bundle = export(str(model), tmp_path / "raw", layers="6", layer_norm=False)
    assert bundle.manifest.layers.to_json() == {"blocks": (6,), "norm": False}
    with FeatureExtractor.load(bundle.folder, backend="onnxruntime-cpu") as extractor:
        dense = extractor.dense(frames)
    norms = np.linalg.norm(dense.layers[6].features, axis=-1)
    np.testing.assert_allclose(norms, dense.token_norm, rtol=1e-4)
    assert dense.attention is None


# What is refused


@pytest.mark.parametrize("name", ["features.4", "cls.4", "token_norm.2", "attention"])
def test_a_bundle_with_one_wrong_output_of_a_layer_is_refused(layered, tmp_path, name):
    assert invoke("check", layered, "--backend", "onnxruntime-cpu").code == 0
    broken = BrokenBundle(layered, tmp_path / "broken")
    scale_outputs(broken, **{name: -1.0 if name == "cls.4" else 1.5})
    done = invoke("check", broken.save(), "--backend", "onnxruntime-cpu", "--json")
    done.refused(3)
    part = name.rpartition(".")[2] if name != "attention" else name
    where = part if part == "attention" else f"layer {part}"
    wrong = [c["size"] for c in done.document["comparisons"] if missed_gates(Parity.from_json(c["parity"]), "fp32")]
    assert wrong == [f"64x64, batch 2, {where}"]
    with pytest.raises(PhregError, match=rf"fails the exam \({where}: "):
        FeatureExtractor.load(broken.folder)


def test_the_exam_misses_an_output_that_a_runtime_leaves_out(layered):
    bundle = Bundle.read(layered)
    with FeatureExtractor.load(layered, backend="onnxruntime-cpu") as extractor:
        for name, words in (("features.4", "no features.4"), ("cls.4", "no cls.4"), ("attention", "no attention")):

            def answer(image, name=name):
                return {key: value for key, value in extractor.run(image).items() if key != name}

            with pytest.raises(PhregError, match=words):
                judge_exam(bundle, answer, "onnxruntime-cpu", "fp32")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"blocks": [2, 4, 7], "norm": True}, "layers.blocks"),
        ({"blocks": [4, 2, 6], "norm": True}, "layers.blocks"),
        ({"blocks": [], "norm": True}, "layers.blocks"),
        ({"blocks": "all", "norm": True}, "layers.blocks"),
        ({"blocks": [2, 4, 6], "norm": 1}, "layers.norm"),
        ({"blocks": [2, 4, 5], "norm": True}, "outputs"),
        ({"blocks": [2, 4, 6]}, "Layers: got the keys"),
    ],
)
def test_a_manifest_with_impossible_layers_is_refused(layered, tmp_path, layers, words):
    folder = rewrite_bundle(Path(shutil.copytree(layered, tmp_path / "bundle")), layers=layers)
    with pytest.raises(PhregError, match=words):
        Bundle.read(folder)


@pytest.mark.parametrize("family", ["siglip", "aimv2"])
def test_attention_of_a_model_without_class_token_is_refused(tmp_path, family):
    model = save(small(family), tmp_path / "model")
    done = invoke("export", model, "-o", tmp_path / "bundle", "--attention", "--json")
    done.refused(2, "has no class token", "Leave out --attention")
    if family == "siglip":
        assert "pools its patches by an attention of its own" in done.err
    assert not (tmp_path / "bundle").exists()


def test_a_layer_that_the_model_lacks_is_refused(model, tmp_path):
    done = invoke("export", model, "-o", tmp_path / "bundle", "--layers", "3,7", "--json")
    done.refused(2, "got 7, expected numbers from 1 to 6")
    done = invoke("export", model, "-o", tmp_path / "bundle", "--layers", "x", "--json")
    done.refused(2, "got 'x', expected numbers of")
    done = invoke("export", model, "-o", tmp_path / "bundle", "--no-layer-norm", "--json")
    done.refused(2, "without --layers")


# INT8, engines, files


def test_int8_is_judged_by_every_layer(layered, photos, tmp_path, frames):
    calibrate(layered, photos, tmp_path / "eight", force=True)
    eight = Bundle.read(tmp_path / "eight")
    assert eight.manifest.layers == Bundle.read(layered).manifest.layers
    assert set(eight.cases()[0]) == {"image", *eight.manifest.outputs}
    with FeatureExtractor.load(layered, backend="onnxruntime-cpu") as full:
        with FeatureExtractor.load(eight.folder, backend="onnxruntime-cpu") as extractor:
            got, expected = extractor.dense(frames).outputs(), full.dense(frames).outputs()
            assert all(gate.passed for gate in judge_exam(eight, extractor.run, extractor.backend, "fp32")[1])
    accumulator = ParityAccumulator()
    accumulator.add(got, expected)
    parts = accumulator.parts()
    assert set(parts) == {"", "2", "4", "6", "attention"}
    assert min(part.cosine_p1 for part in parts.values()) > 0.97
    assert parts["2"].cosine_mean < 1


def test_calibration_compares_every_layer(layered, tmp_path, frames):
    broken = BrokenBundle(layered, tmp_path / "broken")
    scale_outputs(broken, **{"features.4": -1.0})
    feeds = [({"image": frames[:2]}, 2), ({"image": frames[2:]}, 1)]
    right, wrong = (
        onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        for folder in (layered, broken.save())
    )
    images = EvalSet(feeds, [run_session(right, feed, count) for feed, count in feeds])
    assert missed_gates(compare(right, images, None).parity(), "int8") == []
    parity = compare(wrong, images, None).parity()
    assert parity.cosine_p1 < -0.999
    assert missed_gates(parity, "int8")


@pytest.mark.parametrize("name", ["features.4", "cls.2", "attention"])
def test_an_engine_with_one_wrong_layer_is_refused(layered, tmp_path, tensorrt, name):
    folder = Path(shutil.copytree(layered, tmp_path / "bundle"))
    sound = invoke("build", folder, "--json")
    assert sound.code == 0, sound.err
    with FeatureExtractor.load(folder, backend="tensorrt") as extractor:
        assert list(extractor.dense(np.zeros((2, 64, 64, 3), np.uint8)).layers) == [2, 4, 6]
    shutil.rmtree(folder / "engines")
    tensorrt.answer = lambda output, values: np.roll(values, 1, axis=-1) if output == name else values
    where = "attention:" if name == "attention" else f"layer {name.rpartition('.')[2]}:"
    invoke("build", folder, "--json").refused(3, "parity:", where, "The engine was not kept")
    assert not list((folder / "engines").glob("*.plan"))


def test_layers_and_attention_are_extracted_as_files(layered, photos, tmp_path):
    outputs = "features.4,cls.4,token_norm.4,attention"
    done = invoke("extract", layered, photos, "-o", tmp_path / "out", "--outputs", outputs, "--json")
    assert done.code == 0, done.err
    entry = done.document["images"][0]
    shapes = {name: np.load(tmp_path / "out" / entry[name]).shape for name in outputs.split(",")}
    assert shapes == {"features.4": (4, 4, 48), "cls.4": (48,), "token_norm.4": (4, 4), "attention": (3, 4, 4)}
    assert entry["features.4"].endswith(".features.4.npy")
    lacking = invoke("extract", layered, photos, "-o", tmp_path / "no", "--outputs", "features.3", "--json")
    lacking.refused(2, "this bundle has no features.3")
    with pytest.raises(PhregError, match=r"of a layer \(features\.6\)"):
        parse_outputs("features.0")


def test_files_of_layers_do_not_replace_each_other(photos, tmp_path):
    picture = next(iter(sorted(photos.glob("*.png"))))
    for name in ("a.png", "a.features.4.png"):
        shutil.copyfile(picture, tmp_path / name)
    names = [image.name for image in find_images([tmp_path], ("features", "features.4"))]
    files = {f"{name}.npy" for name in names} | {f"{name}.features.4.npy" for name in names}
    assert len(files) == 4


def test_artifact_rates_of_layers_are_reported(layered, model, photos):
    done = invoke("artifacts", layered, "--images", photos, "--limit", "4", "--json")
    assert done.code == 0, done.err
    scored = done.document["layers"]
    assert set(scored) == {"2", "4", "6"}
    torch = invoke("artifacts", model, "--images", photos, "--limit", "4", "--json").document["blocks"]
    for block in (2, 4, 6):
        assert scored[str(block)]["median"] == pytest.approx(torch[block - 1]["median"], rel=1e-4)
        assert scored[str(block)]["upper"] == pytest.approx(torch[block - 1]["rate"])
    checked = invoke("check", layered, "--reference", model, "--images", photos, "--limit", "4", "--json")
    assert checked.code == 0, checked.err
    assert set(checked.document["artifacts"]["bundle"]["layers"]) == {"2", "4", "6"}
    sizes = [c["size"] for c in checked.document["comparisons"] if c["with"].startswith("PyTorch")]
    assert [size.rpartition(", ")[2] for size in sizes] == ["4 images", "layer 2", "layer 4", "layer 6", "attention"]
