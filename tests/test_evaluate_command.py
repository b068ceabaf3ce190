"""``evaluate`` and ``probe`` on a small model, its student and its bundle, over drawn scenes."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.heads import Head
from tests.cli_helpers import leftovers, without
from tests.labelled_scenes import CLASSES, PALETTE, write_labelled

pytestmark = pytest.mark.usefixtures("torch")
HEAVY = ["torch", "timm", "onnx", "onnxscript", "torchvision"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled") / "scenes")


@pytest.fixture
def words(scenes):
    options = ["--images", scenes / "images", "--masks", scenes / "masks", "--classes", scenes / "names.txt"]
    return [*options, "--device", "cpu", "--backend", "onnxruntime-cpu"]


@pytest.fixture(scope="module")
def evaluated(scenes, base, bundle, tmp_path_factory, run_cli):
    """The base, the base again and the bundle; the document and the folder of the report."""
    out = tmp_path_factory.mktemp("evaluated") / "report"
    options = ["--images", scenes / "images", "--masks", scenes / "masks", "--classes", scenes / "names.txt"]
    outcome = run_cli("evaluate", base, base, bundle, *options, "--device", "cpu", "-o", out, "--json")
    assert outcome.code == 0, outcome.err[-800:]
    return outcome, out


def test_every_model_is_compared_with_the_first(evaluated):
    document = evaluated[0].document
    assert (document["train"], document["val"], document["groups"]) == (8, 4, 3)
    assert document["resampled"] == "images"
    assert document["classes"] == list(CLASSES)
    assert document["colours"] == [list(colour) for colour in PALETTE]
    first, again, bundle = document["subjects"]
    assert [s["kind"] for s in document["subjects"]] == ["student", "student", "bundle"]
    assert first["against_base"] is None
    assert again["against_base"]["verdict"] == "not told apart"
    assert again["seeds"] != first["seeds"]
    assert bundle["against_base"]["figure"] == "miou"
    # The base's four planted corner tokens, of which the mask leaves the lower two without class.
    assert document["outliers"] == 16
    for subject in document["subjects"]:
        figures = subject["figures"]
        assert 0.15 < figures["miou"] < figures["pixel_accuracy"] < 1
        low, high = subject["intervals"]["miou"]
        assert low <= figures["miou"] <= high
        assert 0 <= figures["outlier_accuracy"] <= 1
        known = [iou for iou in subject["class_iou"] if iou is not None]
        assert np.mean(known) == pytest.approx(figures["miou"])
        assert subject["converged"]
    assert (first["computed"], again["computed"]) == (12, 0)
    assert first["cache_bytes"] == again["cache_bytes"] > 12 * 64 * 48 * 2
    assert document["cache_bytes"] == first["cache_bytes"] + bundle["cache_bytes"]


def test_tables_name_figures_verdict_and_conditions(evaluated):
    text = " ".join(evaluated[0].err.split())
    for part in (
        "Linear probe (logistic), 8 images to train on, 4 to test on",
        "not told apart",
        "IoU by class",
        "sky",
    ):
        assert part in text
    assert "by a hash of 3 groups, 1 of them to test on" in text
    assert "other images of the same groups alone" in text
    assert "MB" in text


def test_the_report_has_pictures(evaluated):
    _, folder = evaluated
    document = json.loads((folder / "evaluation.json").read_text())
    assert len(document["pictures"]) == 4
    assert {p.name for p in folder.iterdir()} == {"evaluation.json", *document["pictures"]}
    with Image.open(folder / document["pictures"][0]) as sheet:
        # Image, truth, before, after twice, and the key of classes.
        assert sheet.size == (5 * 252 + 268 + 12, 284)
        truth = np.asarray(sheet)[32:272, 264:504].reshape(-1, 3)
    assert {tuple(c) for c in np.unique(truth, axis=0).tolist()} <= {*PALETTE, (224, 224, 192)}


def test_features_are_read_from_the_cache_and_damaged_ones_computed_again(world, words, home, run_cli):
    def computed():
        outcome = run_cli("evaluate", world.base, *words, "--seeds", "1", "--image-size", "48", "--json")
        assert outcome.code == 0, outcome.err[-500:]
        return outcome.document["subjects"][0]["computed"], outcome.document["subjects"][0]["figures"]

    before = set(home.glob("features-*"))
    first = computed()
    (folder,) = set(home.glob("features-*")) - before
    files = sorted(folder.iterdir())
    assert (first[0], len(files)) == (12, 12)
    files[0].write_bytes(files[0].read_bytes()[:-200])
    damaged = bytearray(files[1].read_bytes())
    damaged[len(damaged) // 2] ^= 255
    files[1].write_bytes(damaged)
    second = computed()
    assert second == (2, first[1])
    outcome = run_cli("evaluate", world.base, *words, "--seeds", "1", "--image-size", "48", "--no-cache", "--json")
    assert outcome.document["subjects"][0]["figures"] == first[1]
    assert outcome.document["cache"] is None


def test_probe_writes_the_first_head_of_evaluate(world, words, evaluated, run_cli, scenes):
    outcome = run_cli("probe", world.base, *words, "-o", world.out, "--json")
    assert outcome.code == 0, outcome.err[-500:]
    head = Head.read(world.out)
    assert head.classes == CLASSES
    assert (head.task, head.ignore, head.layers, head.width) == ("segmentation", 255, None, 48)
    seeds = evaluated[0].document["subjects"][0]["seeds"]
    assert head.trained_on["figures"]["miou"] == pytest.approx(seeds[0])
    # The head reads features of another extractor, here PyTorch's, to the same labels.
    from phreg_deploy.models.answers import model_answers
    from phreg_deploy.models.loading import load_model, model_preprocess

    model = load_model(str(world.base))
    image = np.array(Image.open(scenes / "images/drive0_0000.png"))[None]
    labels = head.labels(model_answers(model, model_preprocess(model))(image)["features"], (64, 64))
    truth = np.asarray(Image.open(scenes / "masks/drive0_0000.png"))
    assert (labels[0] == truth)[truth != 255].mean() > 0.5
    run_cli("probe", world.base, *words, "-o", world.out, "--json").refused(2, "--force")
    assert leftovers(world.tmp) == []


def test_layers_are_joined(world, words, run_cli):
    outcome = run_cli("probe", world.base, *words, "--layers", "1,3", "-o", world.out, "--json")
    assert outcome.code == 0, outcome.err[-500:]
    head = Head.read(world.out)
    assert (head.layers, head.width) == ((1, 3), 96)
    run_cli("evaluate", world.bundle, *words, "--layers", "2", "--json").refused(
        2, "does not serve layer 2", "--layers"
    )


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_depth(world, scenes, run_cli, suffix):
    folder = scenes / "depth"
    if suffix == ".npy":
        folder = world.tmp / "depth"
        folder.mkdir()
        for path in (scenes / "depth").iterdir():
            np.save(folder / f"{path.stem}.npy", np.asarray(Image.open(path)).astype(np.float32) / 1000)
    options = ["--images", scenes / "images", "--depth", folder, "--device", "cpu", "--seeds", "2"]
    outcome = run_cli("evaluate", world.base, world.base, *options, "-o", world.out, "--json")
    assert outcome.code == 0, outcome.err[-500:]
    document = outcome.document
    assert (document["task"], document["protocol"], document["classes"]) == ("depth", "ridge", None)
    figures = document["subjects"][0]["figures"]
    # Depth follows the row alone, which the position embedding tells; a constant has an AbsRel of about 0.75.
    assert figures["abs_rel"] < 0.3
    assert figures["delta_1"] > 0.5
    assert document["subjects"][1]["against_base"]["figure"] == "rmse"
    if suffix == ".png":
        head = world.tmp / "head"
        assert run_cli("probe", world.base, *options[:-2], "-o", head, "--json").code == 0
        low, high = Head.read(head).depth_range
        assert 1 < low < 2 < 8 < high < 9


def test_bundles_need_no_torch(world, words):
    commands = [
        ["evaluate", world.bundle, *words, "--seeds", "1", "--json"],
        ["probe", world.bundle, *words, "-o", world.out, "--json"],
        ["evaluate", world.bundle, world.base, *words, "--json"],
    ]
    alone, probed, mixed = without(HEAVY, commands)
    assert (alone.code, probed.code) == (0, 0), alone.err + probed.err
    assert Head.read(world.out).width == 48
    mixed.refused(4, "'timm', 'torch'", "phreg-deploy[distill]")


def test_a_missing_extra_is_named(world, words, run_cli, monkeypatch):
    for module in ("scipy", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    for command in (["evaluate", world.bundle], ["probe", world.bundle, "-o", world.out]):
        run_cli(*command, *words, "--json").refused(4, "'scipy', 'sklearn'", 'pip install "phreg-deploy[evaluate]"')


MISTAKES = {
    "no truth": (lambda w, s: ["--images", s / "images"], ["neither of --masks and --depth"]),
    "two truths": (
        lambda w, s: ["--images", s / "images", "--masks", s / "masks", "--depth", s / "depth"],
        ["both of --masks and --depth"],
    ),
    "masks of nothing": (lambda w, s: ["--images", s / "images", "--masks", s / "none"], ["there is no folder"]),
    "masks of others": (lambda w, s: ["--images", w.photos, "--masks", s / "masks"], ["the same names"]),
    "no class named": (
        lambda w, s: ["--images", s / "images", "--masks", s / "masks", "--classes", s / "none.txt"],
        ["none.txt cannot be read"],
    ),
    "a protocol": (
        lambda w, s: ["--images", s / "images", "--masks", s / "masks", "--protocol", "svm"],
        ["'svm'", "logistic, ridge, dinov2 or ovss"],
    ),
    "a protocol of depth": (
        lambda w, s: ["--images", s / "images", "--depth", s / "depth", "--protocol", "logistic"],
        ["with --depth, expected ridge"],
    ),
    "classes of depth": (
        lambda w, s: ["--images", s / "images", "--depth", s / "depth", "--classes", s / "names.txt"],
        ["--classes goes with --masks"],
    ),
    "a share": (lambda w, s: ["--images", s / "images", "--masks", s / "masks", "--share", "1"], ["between 0 and 1"]),
    "a size": (
        lambda w, s: ["--images", s / "images", "--masks", s / "masks", "--image-size", "50"],
        ["50x50", "48x48 and 56x56"],
    ),
    "a checkpoint too many": (
        lambda w, s: ["--images", s / "images", "--masks", s / "masks", "--checkpoint", w.checkpoint],
        ["1 files for 0 timm names"],
    ),
    "one group": (
        lambda w, s: ["--images", s / "images", "--masks", s / "masks", "--group", "drive"],
        ["one group", "--group image"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_a_message(world, scenes, run_cli, case):
    arguments, fragments = MISTAKES[case]
    run_cli("evaluate", world.base, *arguments(world, scenes), "-o", world.out, "--json").refused(2, *fragments)
    assert not world.out.exists()


def test_a_mask_of_other_proportions_is_refused(world, scenes, run_cli):
    folder = world.tmp / "masks"
    folder.mkdir()
    for path in (scenes / "masks").iterdir():
        Image.open(path).resize((64, 48), Image.Resampling.NEAREST).save(folder / path.name)
    words = ["--images", scenes / "images", "--masks", folder, "--no-cache", "--device", "cpu"]
    run_cli("evaluate", world.base, *words, "--json").refused(2, "64x48 pixels", "64x64", "the same proportions")
