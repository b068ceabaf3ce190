"""Text embeddings as a head: its answers against PyTorch, the background, TensorRT, INT8, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import PhregError
from phreg_deploy.heads import ClassEmbeddings, attach
from phreg_deploy.heads.answers import attached_heads
from phreg_deploy.images.upsampling import joint_bilateral
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import judge_exam
from tests import nvidia
from tests.cli_helpers import invoke

WIDTH = 32
NAMES = ("road", "street", "car", "tree", "bush", "hedge")
CLASSES = (0, 0, 1, 2, 2, 2)


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dense(clip_bundle, frames):
    with FeatureExtractor.load(clip_bundle, "onnxruntime-cpu") as extractor:
        return extractor.dense(frames)


@pytest.fixture(scope="module")
def classes(dense):
    """Embeddings that tell the patches of ``frames`` apart."""
    patches = dense.features.reshape(-1, WIDTH)
    own = (patches - patches.mean(0))[:: len(patches) // len(NAMES)][: len(NAMES)]
    own = (own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float32)
    return ClassEmbeddings(own, NAMES, CLASSES, 20.0, None, "ViT-B-16", "", (), ("a {}.",))


def by_pytorch(features, classes, scale, background, size=None):
    """Scores and, separately, the labels of OVSS code: softmax over names, the largest of a class, the threshold."""
    x = torch.from_numpy(features).double()
    e = torch.from_numpy(classes.embeddings).double()
    scores = scale * torch.nn.functional.cosine_similarity(x[..., None, :], e, dim=-1) + (classes.bias or 0.0)
    shares = scores.softmax(-1) if classes.bias is None else scores.sigmoid()
    ids = torch.tensor(classes.classes)
    every = [shares[..., ids == k].max(-1).values for k in range(classes.classes[-1] + 1)]
    best = torch.stack(every, -1)
    labels = best.argmax(-1)
    if background is not None:
        first = classes.class_names[0] == "background"
        labels = torch.where(best.max(-1).values < background, 0, labels + (0 if first else 1))
    return labels.numpy()


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize(
    ("bias", "first", "background"),
    [
        (None, "road", None),
        (None, "road", 0.5),
        (None, "background", 0.6),
        (-4.0, "road", 0.5),
        (-4.0, "background", 0.7),
    ],
)
def test_labels_equal_the_rule_of_ovss_code(
    clip_bundle, classes, frames, dense, tmp_path, backend, bias, first, background
):
    pytest.importorskip(backend.partition("-")[0])
    classes = replace(classes, bias=bias, names=(first, *NAMES[1:]))
    head = classes.head(background=background)
    attach(clip_bundle, {"": head}, tmp_path / "text")
    with FeatureExtractor.load(tmp_path / "text", backend, compute="fp32") as extractor:
        found = extractor.dense(frames)
        parity, _ = judge_exam(extractor.bundle, extractor.run, backend, "fp32")
    assert parity.head_change == 0
    expected = by_pytorch(dense.features, classes, 20.0, background)
    np.testing.assert_array_equal(found.labels, expected)
    np.testing.assert_allclose(found.segmentation, head.logits(dense.features), atol=2e-4)
    assert len(np.unique(expected)) > 2
    assert found.segmentation.shape[-1] == len(head.classes) == 3 + (background is not None and first == "road")
    if background is not None:
        assert 0 < (expected == 0).mean() < 0.9
    ((served, again),) = attached_heads(Bundle.read(tmp_path / "text"))
    assert (served.classes, again.classes) == (head.classes, head.classes)
    assert again.rule == replace(head.rule, background=again.rule.background)
    np.testing.assert_allclose(again.logits(dense.features), head.logits(dense.features), atol=1e-5)


def test_scores_are_cosines_times_a_scale(clip_bundle, classes, frames, dense, tmp_path):
    alone = replace(classes, classes=tuple(range(len(NAMES))))
    attach(clip_bundle, {"": alone.head(7.0)}, tmp_path / "small")
    attach(clip_bundle, {"": alone.head(7.0)}, tmp_path / "large", upsample="bilinear")
    with FeatureExtractor.load(tmp_path / "small", "onnxruntime-cpu") as extractor:
        np.testing.assert_allclose(
            extractor.dense(frames).segmentation, 7 * dense.similarity(alone.embeddings), atol=1e-4
        )
    scores = torch.from_numpy(7 * dense.similarity(alone.embeddings)).permute(0, 3, 1, 2)
    enlarged = torch.nn.functional.interpolate(scores, (64, 64), mode="bilinear").permute(0, 2, 3, 1)
    with FeatureExtractor.load(tmp_path / "large", "onnxruntime-cpu") as extractor:
        np.testing.assert_allclose(extractor.dense(frames).segmentation, enlarged.numpy(), atol=1e-4)


def test_similarity_takes_any_embedding(dense, clip_bundle):
    patch = dense.features[0, 1, 2]
    maps = dense.similarity(patch)
    assert maps.shape == dense.features.shape[:3]
    assert maps[0, 1, 2] == pytest.approx(1, abs=1e-6)
    assert np.abs(maps).max() <= 1 + 1e-6
    several = dense.similarity([patch.tolist(), (-3 * patch).tolist()])
    np.testing.assert_allclose(several[..., 1], -maps, atol=1e-6)
    assert not dense.similarity(np.zeros(WIDTH)).any()
    for wrong in (np.zeros(7), np.zeros((2, 2, WIDTH)), np.full(WIDTH, np.nan), ["car"], None):
        with pytest.raises(PhregError, match=r"^similarity: "):
            dense.similarity(wrong)


def test_eight_bits_take_text_as_a_linear_head(clip_bundle, classes, photos, tmp_path):
    from phreg_deploy.calibration import calibrate

    calibrate(clip_bundle, photos, tmp_path / "int8", cosine_p1=0.5)
    eight = attach(tmp_path / "int8", {"": classes.head()}, tmp_path / "eight", labels=True, upsample="bilinear")
    assert eight.manifest.precision == "int8"
    with FeatureExtractor.load(tmp_path / "eight", "onnxruntime-cpu") as extractor:
        answers = extractor(photos / "frame-03.jpg")
    expected = classes.head().logits(answers.features)
    assert answers.labels.shape == (1, 64, 64)
    assert set(np.unique(answers.labels)) <= set(range(3))
    assert (answers.labels[:, 8::16, 8::16] == expected.argmax(-1)).mean() > 0.6


def test_calibration_keeps_text_in_float(clip_bundle, classes, photos, tmp_path):
    """Synonyms, a background and joint bilateral enlargement, in the graph before it is calibrated."""
    from phreg_deploy.calibration import calibrate

    head = classes.head(background=0.3)
    attach(clip_bundle, {"": head}, tmp_path / "text", upsample="joint-bilateral", stride=4)
    calibrate(tmp_path / "text", photos, tmp_path / "int8", cosine_p1=0.5)
    with FeatureExtractor.load(tmp_path / "int8", "onnxruntime-cpu") as extractor:
        image = extractor.prepare(photos / "frame-03.jpg")[None]
        answers = extractor.dense(image)
    expected = joint_bilateral(head.logits(answers.features), image, 4)
    np.testing.assert_allclose(answers.segmentation, expected, atol=1e-3)


def test_the_command_attaches_and_extract_and_inspect_read_it(clip_bundle, clip_models, classes, photos, tmp_path):
    classes.write(tmp_path / "classes.npz")
    words = ["attach", clip_bundle, "--classes", tmp_path / "classes.npz", "-o", tmp_path / "text", "--labels"]
    done = invoke(*words, "--background", "0.3", "--scale", "30", "--json")
    assert done.code == 0, done.err
    assert done.document["check"]["parity"]["head_change"] == 0
    (served,) = done.document["manifest"]["heads"]
    assert served["classes"] == ["background", "road", "car", "tree"]
    assert json.loads((tmp_path / "text" / "manifest.json").read_text())["outputs"]["labels"]["dtype"] == "uint8"
    done = invoke("inspect", tmp_path / "text", "--json")
    assert done.code == 0, done.err
    done = invoke("extract", tmp_path / "text", photos, "-o", tmp_path / "out", "--outputs", "labels", "--json")
    assert done.code == 0, done.err
    first = np.load(tmp_path / "out" / done.document["images"][0]["labels"])
    assert (first.dtype, first.shape) == (np.dtype(np.uint8), (4, 4))
    words = ["check", tmp_path / "text", "--reference", clip_models / "timm", "--images", photos, "--json"]
    done = invoke(*words)
    assert done.code == 0, done.err
    export = ["export", clip_models / "timm", "-o", tmp_path / "exported", "--project", "--json", "--labels"]
    done = invoke(*export, "--classes", tmp_path / "classes.npz", "--background", "0.3", "--scale", "30")
    assert done.code == 0, done.err
    assert done.document["manifest"]["heads"] == [served]
    invoke(*export[:-1], "--force", "--scale", "3").refused(2, "--scale and --background go with --classes")
    invoke(*export, "--force", "--classes", tmp_path / "none.npz").refused(2, "there is no file")
    more = ["attach", tmp_path / "text", "-o", tmp_path / "more", "--json"]
    named = f"again={tmp_path / 'classes.npz'}"
    assert invoke(*more, "--classes", named).document["manifest"]["heads"][1]["name"] == "again"
    invoke(*more[:-2], tmp_path / "none", "--json").refused(2, "got no head, expected --head HEAD or --classes FILE")
    words = [*more[:-2], tmp_path / "none", "--json", "--classes", tmp_path / "classes.npz"]
    invoke(*words, "--background", "1.5").refused(2, "got 1.5, expected a probability between 0 and 1")
    invoke(*words, "--scale", "0").refused(2, "got 0.0, expected a number above 0")
    invoke(*words, "--head", tmp_path / "head").refused(2, "got two heads named ''")
    invoke(*words[:-2], "--head", tmp_path / "head", "--scale", "3").refused(2, "go with --classes")


def test_embeddings_of_another_model_are_refused(clip_bundle, bundle, classes, tmp_path):
    wide = np.eye(6, 40, dtype=np.float32)
    for folder, given, message in (
        (bundle, classes, "not projected into the space of text. Export it with --project"),
        (clip_bundle, replace(classes, embeddings=wide), "have 40 channels, and the features of the bundle 32"),
        (
            clip_bundle,
            replace(classes, vision=("vit_base_patch16_siglip_224.webli",)),
            "go with vit_base_patch16_siglip_224.webli, and the features come from vit_base_patch16_clip_quickgelu_224",
        ),
    ):
        with pytest.raises(PhregError, match=f"^attach: .*{message}"):
            attach(folder, {"": given.head()}, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    own = replace(classes, vision=("vit_base_patch16_clip_quickgelu_224.openai",))
    own.write(tmp_path / "classes.npz")
    # The bundle's weights have no tag, so the architecture decides.
    written = attach(clip_bundle, {"": tmp_path / "classes.npz"}, tmp_path / "out")
    assert written.manifest.heads[0].classes == ("road", "car", "tree")
    many = replace(classes, embeddings=np.eye(256, dtype=np.float32), names=("a",) * 256, classes=tuple(range(256)))
    with pytest.raises(PhregError, match="expected at most 256"):
        many.head(background=0.1)


BUILD = """
from pathlib import Path
import tensorrt as trt
from phreg_deploy.bundle.plans import BuildSettings
from phreg_deploy.bundle.profiles import ProfileShapes
from phreg_deploy.export.engine.builder import build_plan
from phreg_deploy.errors import PhregError
results = {}
for path, profiles in given.items():
    try:
        results[path] = len(build_plan(trt, Path(path), [ProfileShapes(i) for i in profiles], BuildSettings()).plan)
    except PhregError as error:
        results[path] = str(error)
print(json.dumps(results))
"""


def test_nvidias_parser_and_builder_take_the_head(clip_bundle, classes, tmp_path):
    """Labels with synonyms; scores with a background of the first class; labels with a further background."""
    nvidia.bindings(nvidia.NEWEST)
    own = replace(classes, names=("background", *NAMES[1:])).head(background=0.5)
    attach(clip_bundle, {"a": classes.head()}, tmp_path / "a", labels=True, upsample="bilinear")
    attach(tmp_path / "a", {"b": own}, tmp_path / "b", upsample="joint-bilateral", stride=4)
    made = attach(tmp_path / "b", {"c": classes.head(background=0.5)}, tmp_path / "c", labels=True)
    given = {str(made.graph): [profile.inputs for profile in profiles_of(made.manifest)]}
    (size,) = nvidia.inside(nvidia.NEWEST, BUILD, given, rtx=True).values()
    assert isinstance(size, int), size
    assert size > 1000
