"""Bundles that serve their heads alone: what they serve, what still judges them, and what they refuse."""

import json
import shutil

import numpy as np
import onnx
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.validity import read_manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.heads import ClassEmbeddings, attach
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import judge_exam
from phreg_deploy.verify import check
from tests.broken_bundles import BrokenBundle, scale_outputs
from tests.build_helpers import build
from tests.head_helpers import NAMES, WIDTH, head


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
def test_the_answers_are_those_beside_features(alone, beside, photos, backend):
    pytest.importorskip(backend.partition("-")[0])
    dense = []
    for folder in (alone, beside):
        with FeatureExtractor.load(folder, backend, compute="fp32") as extractor:
            dense.append(extractor(sorted(photos.iterdir())[:3]))
    own, other = dense
    np.testing.assert_array_equal(own.labels, other.labels)
    np.testing.assert_allclose(own.token_norm, other.token_norm, rtol=1e-5)
    np.testing.assert_array_equal(own.artifact_rate, other.artifact_rate)
    assert set(own.outputs()) == {"labels", "token_norm"}
    np.testing.assert_array_equal(own.single(1).labels, own.labels[1:2])
    np.testing.assert_array_equal(other.single(1).features, other.features[1:2])
    assert own.cls is None
    assert not hasattr(own, "features")
    with pytest.raises(PhregError, match=r"^features: .*--only-head.*Read heads, labels"):
        own.similarity(np.ones(WIDTH))


def test_the_manifest_says_so_and_the_graph_holds_nothing_else(alone, beside, street):
    manifest = Bundle.read(alone).manifest
    assert sorted(manifest.outputs) == ["labels", "token_norm"]
    assert manifest.only_heads
    document = json.loads((alone / "manifest.json").read_text())
    assert document["only_heads"] is True
    assert "only_heads" not in json.loads((beside / "manifest.json").read_text())
    graphs = [onnx.load(folder / "model.onnx").graph for folder in (alone, beside)]
    assert [value.name for value in graphs[0].output] == ["token_norm", "labels"]
    # The class token's norm and slice are gone.
    assert len(graphs[0].node) < len(graphs[1].node)
    read = {name for node in graphs[0].node for name in node.input}
    assert {tensor.name for tensor in graphs[0].initializer} <= read
    assert (alone / "reference.npz").stat().st_size < 0.6 * (beside / "reference.npz").stat().st_size
    served = document["outputs"]
    features = {"dtype": "float32", "shape": [1, 8, 8, WIDTH]}
    changes = [
        {"only_heads": False},
        {"only_heads": 1},
        {"only_heads": None},
        {"heads": [], "outputs": {"token_norm": served["token_norm"]}},
        {"outputs": {**served, "features": features}},
        {"outputs": {"labels": served["labels"]}},
    ]
    for change in changes:
        with pytest.raises(PhregError, match=r"^manifest: "):
            read_manifest({**document, **change})


def test_features_are_taken_out_of_a_bundle_that_has_heads(alone, beside, tmp_path):
    attach(beside, {}, tmp_path / "out", only_head=True)
    out, whole = Bundle.read(tmp_path / "out"), Bundle.read(alone)
    assert out.manifest.files["model.onnx"] == whole.manifest.files["model.onnx"]
    for name, value in whole.cases()[0].items():
        np.testing.assert_array_equal(out.cases()[0][name], value)


def test_layers_that_a_head_reads_stay_known(ranging, student, photos, frames, tmp_path):
    attach(ranging, {"": head(5, WIDTH, classes=NAMES, layers=(1,))}, tmp_path / "beside")
    attach(tmp_path / "beside", {"far": head(1, task="depth", seed=2)}, tmp_path / "alone", only_head=True)
    manifest = Bundle.read(tmp_path / "alone").manifest
    assert manifest.layers.blocks == (1,)
    assert sorted(manifest.outputs) == ["depth.far", "segmentation", "token_norm"]
    with (
        FeatureExtractor.load(tmp_path / "alone", "onnxruntime-cpu") as extractor,
        FeatureExtractor.load(tmp_path / "beside", "onnxruntime-cpu") as other,
    ):
        dense, whole = extractor.dense(frames), other.dense(frames)
        np.testing.assert_allclose(dense.segmentation, whole.segmentation, rtol=1e-4, atol=1e-4)
        assert dense.layers == {}
        # Windows are blended as they are beside features.
        image = np.random.default_rng(3).integers(0, 256, (90, 130, 3), dtype=np.uint8)
        tiled, wide = (one.tiled(image, 64, 32) for one in (extractor, other))
        np.testing.assert_allclose(tiled.segmentation, wide.segmentation, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(tiled.window_artifact_rate, wide.window_artifact_rate)
    report = check(tmp_path / "alone", reference=str(student), images=photos, limit=3, backend="onnxruntime-cpu")
    assert not report.missed
    names = {gate.name for gates in report.gates.values() for gate in gates}
    assert names == {"bad_values", "norm_bias", "norm_difference", "outlier_points", "head_change"}


def test_a_wrong_graph_fails_the_exam_and_check(alone, student, photos, tmp_path):
    options = {"reference": str(student), "images": photos, "limit": 3, "backend": "onnxruntime-cpu"}
    report = check(alone, **options)
    assert not report.missed
    assert report.by_image is None
    assert report.artifacts["bundle"].shift_incoherence is None
    assert report.artifacts["student"].shift_incoherence is not None
    rates = [report.artifacts[name].norm_outliers.rate for name in ("bundle", "student")]
    assert rates[0] == rates[1]
    broken = BrokenBundle(alone, tmp_path / "broken")
    for node in broken.model.graph.node:
        if node.op_type == "ArgMax":
            node.op_type = "ArgMin"
    missed = check(broken.save(), **options)
    assert [gate.name for gates in missed.gates.values() for gate in gates if not gate.passed] == ["head_change"] * 2
    with pytest.raises(PhregError, match=r"a head's answers change at"):
        FeatureExtractor.load(tmp_path / "broken")
    scale_outputs(noisy := BrokenBundle(alone, tmp_path / "nan"), token_norm=float("nan"))
    with FeatureExtractor.load(noisy.save(), "onnxruntime-cpu", examine=False) as extractor:
        parity, gates = judge_exam(extractor.bundle, extractor.run, "onnxruntime-cpu", "fp32")
    assert parity.cosine_p1 is None
    assert parity.bad_values == 64
    assert not gates[0].passed


def test_text_embeddings_are_served_alone(clip_bundle, frames, tmp_path):
    """The width of a projection is known from the features, which are not there."""
    vectors = np.random.default_rng(4).standard_normal((2, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    classes = ClassEmbeddings(vectors, ("road", "car"), (0, 1), 20.0, None, "ViT-B-16", "", (), ("a {}.",))
    attach(clip_bundle, {"": classes.head()}, tmp_path / "text", labels=True, only_head=True)
    with FeatureExtractor.load(tmp_path / "text", "onnxruntime-cpu") as extractor:
        parity, gates = judge_exam(extractor.bundle, extractor.run, "onnxruntime-cpu", "fp32")
        assert set(np.unique(extractor.dense(frames[:, :64]).labels)) <= {0, 1}
    assert all(gate.passed for gate in gates)
    assert parity.head_change == 0


def test_an_engine_of_labels_alone(alone, copy_bundle, tensorrt, tmp_path):
    folder = tmp_path / "engine"
    shutil.copytree(alone, folder)
    done = build(folder)
    assert done.code == 0, done.err
    assert all(run["passed"] and run["cosine_p1"] is None for run in done.document["runs"])
    again = build(folder)
    assert (again.code, again.document["cached"]) == (0, True)
    with FeatureExtractor.load(folder, "tensorrt") as extractor:
        image = np.random.default_rng(5).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
        answers = extractor.run(image)
    assert {name: value.shape for name, value in answers.items()} == {"token_norm": (1, 8, 8), "labels": (1, 32, 32)}
