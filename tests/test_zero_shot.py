"""``evaluate --protocol ovss``: windows, averaging and figures against the code of OVSS in PyTorch, and refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from phreg_deploy.evaluation import EvaluationRequest
from phreg_deploy.evaluation.data.sources import Source
from phreg_deploy.evaluation.scores import class_row
from phreg_deploy.evaluation.zero_shot import enlarged_classes, window_scores
from phreg_deploy.heads import ClassEmbeddings
from phreg_deploy.spec import Preprocess
from tests.labelled_scenes import CLASSES, write_labelled
from tests.text_models import JOINT, PATCH

SIZES = {"drive0_0000": (150, 90), "drive1_0001": (64, 100)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Six scenes, two of them in other shapes than squares."""
    folder = write_labelled(tmp_path_factory.mktemp("ovss") / "scenes", 6)
    for name, size in SIZES.items():
        for part, how in (("images", Image.Resampling.BILINEAR), ("masks", Image.Resampling.NEAREST)):
            path = folder / part / f"{name}.png"
            Image.open(path).resize(size, how).save(path)
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Random embeddings of the scenes' classes, two of which have a synonym."""
    rng = np.random.default_rng(3)
    names = [*CLASSES[:2], "meadow", *CLASSES[2:]]
    ids = [0, 1, 1, *range(2, len(CLASSES))]
    e = rng.standard_normal((len(names), JOINT)).astype(np.float32)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    found = ClassEmbeddings(e, tuple(names), tuple(ids), 100.0, None, "ViT-B-16", "openai", (), ("a photo of a {}.",))
    found.write(tmp_path_factory.mktemp("classes") / "classes.npz")
    return found


@pytest.fixture
def words(scenes, classes, tmp_path):
    classes.write(tmp_path / "classes.npz")
    options = ["--images", scenes / "images", "--masks", scenes / "masks", "--protocol", "ovss"]
    sizes = ["--short-side", "88", "--window", "64", "--stride", "16"]
    return [*options, "--text", tmp_path / "classes.npz", *sizes, "--device", "cpu", "--backend", "onnxruntime-cpu"]


def slide(image, features, classes, window, stride, size, scale, threshold):
    """mmseg's sliding inference and the post-processing of SCLIP, NACLIP and PH-Reg, written again in PyTorch.

    Args:
        image: (1, 3, H, W). features: crop -> (1, C, h, w). size: of the mask.
    """
    h, w = image.shape[-2:]
    names, ids = torch.from_numpy(classes.embeddings), torch.tensor(classes.classes)
    total, count = torch.zeros(1, len(names), h, w), torch.zeros(1, 1, h, w)
    for i in range(max(h - window + stride - 1, 0) // stride + 1):
        for j in range(max(w - window + stride - 1, 0) // stride + 1):
            y2, x2 = min(i * stride + window, h), min(j * stride + window, w)
            y1, x1 = max(y2 - window, 0), max(x2 - window, 0)
            found = features(image[:, :, y1:y2, x1:x2])
            found = found / found.norm(dim=1, keepdim=True)
            logits = torch.einsum("bchw,nc->bnhw", found, names)
            logits = torch.nn.functional.interpolate(logits, (y2 - y1, x2 - x1), mode="bilinear")
            total[:, :, y1:y2, x1:x2] += logits
            count[:, :, y1:y2, x1:x2] += 1
    logits = torch.nn.functional.interpolate(total / count, size, mode="bilinear")[0]
    shares = (logits * scale).softmax(0)
    best = torch.stack([shares[ids == k].max(0).values for k in range(int(ids.max()) + 1)])
    labels = best.argmax(0)
    if threshold is not None:
        labels[best.max(0).values < threshold] = 0
    return labels.numpy()


@pytest.mark.parametrize(("size", "threshold"), [((200, 130), None), ((90, 140), 0.4)])
def test_classes_equal_the_paper_code(classes, size, threshold):
    """With features that follow from a crop's pixels alone, so that both sides see the same ones."""
    names = ("background", *classes.names[1:])
    given = ClassEmbeddings(**{**vars(classes), "names": names})
    mix = torch.randn(JOINT, 3, generator=torch.Generator().manual_seed(2))
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    picture = picture.resize(size, Image.Resampling.BICUBIC)

    def features(crop):
        cells = torch.nn.functional.avg_pool2d(crop.float() / 128 - 1, PATCH)
        # The place in the window matters, as position embeddings do.
        places = torch.linspace(0, 0.3, cells.shape[-1] * cells.shape[-2]).reshape(cells.shape[-2:])
        return torch.einsum("bchw,nc->bnhw", cells, mix) + places

    def run(images):
        found = features(torch.from_numpy(images).permute(0, 3, 1, 2))
        return {"features": found.permute(0, 2, 3, 1).numpy()}

    steps = Preprocess((0.5,) * 3, (0.5,) * 3, "bicubic", "squash", 1.0, False, False)
    source = Source("m", "timm", "", (64, 64), (4, 4), steps, None, "cpu", run)
    head = given.head(40.0, threshold)
    scores = window_scores(picture, source, head, 88, 16)
    assert min(scores.shape[:2]) == 88
    found = enlarged_classes(scores, size[::-1], head)
    small = picture.resize(scores.shape[1::-1], Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    expected = slide(image, features, given, 64, 16, size[::-1], 40.0, threshold)
    assert (found == expected).mean() > 0.9995
    assert len(np.unique(expected)) > 3
    if threshold is not None:
        assert 0.05 < (expected == 0).mean() < 0.95


@pytest.fixture
def evaluated(words, clip_models, clip_bundle, tmp_path, run_cli):
    outcome = run_cli("evaluate", clip_models / "timm", clip_bundle, *words, "-o", tmp_path / "report", "--json")
    assert outcome.code == 0, outcome.err[-800:]
    return outcome


def test_a_model_and_its_bundle_have_the_same_figures(evaluated, scenes, classes, tmp_path):
    document = evaluated.document
    assert (document["train"], document["val"], document["protocol"]) == (0, 6, "ovss")
    assert document["classes"] == list(CLASSES)
    settings = document["settings"]
    assert (settings["scale"], settings["window"], settings["text"]["model"]) == (40, 64, "ViT-B-16")
    model, bundle = document["subjects"]
    assert bundle["against_base"]["verdict"] == "not told apart"
    assert bundle["figures"]["miou"] == pytest.approx(model["figures"]["miou"], abs=1e-3)
    assert (model["figures"]["patch_miou"], model["intervals"]["patch_miou"]) == (None, None)
    low, high = model["intervals"]["miou"]
    assert low <= model["figures"]["miou"] <= high
    text = " ".join(evaluated.err.split())
    for part in ("Text prompts (ovss), 6 images", "windows of 64, stride 16, scale 40", "names embedded by ViT-B-16"):
        assert part in text
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert len(report["pictures"]) == 6


def test_the_mean_iou_is_that_of_the_whole_set(evaluated, words, clip_bundle, classes, scenes):
    """Intersections and unions of all images are summed before they are divided."""
    from phreg_deploy.runtime import FeatureExtractor

    total = 0
    with FeatureExtractor.load(clip_bundle, "onnxruntime-cpu") as extractor:
        run = lambda images: extractor.dense(images).outputs()  # noqa: E731
        source = Source("b", "bundle", "", (64, 64), (4, 4), extractor.preprocess, None, "cpu", run)
        for path in sorted((scenes / "images").iterdir()):
            truth = np.array(Image.open(scenes / "masks" / path.name))
            scores = window_scores(Image.open(path).convert("RGB"), source, classes.head(40.0), 88, 16)
            total = total + class_row(enlarged_classes(scores, truth.shape, classes.head(40.0)), truth, len(CLASSES))
    occurs = total[:, 2] > 0
    expected = (total[:, 0] / np.maximum(total[:, 1], 1))[occurs].mean()
    assert evaluated.document["subjects"][1]["figures"]["miou"] == pytest.approx(expected)


def test_the_first_class_may_have_another_value(evaluated, words, clip_bundle, scenes, tmp_path, run_cli):
    """Masks whose values are one higher, and 0 where there is no class, as those of ADE20K."""
    (tmp_path / "shifted").mkdir()
    for path in (scenes / "masks").iterdir():
        values = np.array(Image.open(path))
        Image.fromarray(np.where(values == 255, 0, values + 1).astype(np.uint8)).save(tmp_path / "shifted" / path.name)
    words = ["evaluate", clip_bundle, *words, "--masks", tmp_path / "shifted", "--first-class", "1", "--json"]
    outcome = run_cli(*words)
    assert outcome.code == 0, outcome.err[-800:]
    assert outcome.document["subjects"][0]["figures"] == evaluated.document["subjects"][1]["figures"]
    run_cli(*words[:-3], "--json").refused(2, "has the value 9, but", "names 9 classes, from 0 to 8")


def test_what_does_not_fit_the_protocol_is_refused(words, clip_models, clip_bundle, bundle, scenes, run_cli, tmp_path):
    def refused(*changes, message, models=(clip_bundle,)):
        run_cli("evaluate", *models, *words, *changes, "--json").refused(2, message)

    refused(
        "--seeds", "2", message="trains nothing and takes its classes and sizes from --text and --window; leave out"
    )
    refused("--classes", scenes / "names.txt", message="leave out --classes")
    refused("--stride", "65", message="a stride up to the window")
    refused("--background", "2", message="a probability between 0 and 1")
    refused("--text", tmp_path / "none.npz", message="there is no file")
    refused("--window", "80", message="got 80x80, expected 64x64")
    refused("--protocol", "logistic", message="--text goes with --protocol ovss")
    refused("--no-project", message="leave out --no-project", models=(clip_models / "timm",))
    refused(message="not projected into the space of text", models=(bundle,))
    run_cli("evaluate", clip_bundle, *words[:6], "--json").refused(2, "--protocol ovss needs --text")
    probe = ["probe", clip_bundle, *words[:6], "-o", tmp_path / "head", "--json"]
    run_cli(*probe).refused(2, "trains no head")
    assert EvaluationRequest(("m",), scenes).text is None
