"""What the tests of examples/ share: scenes with masks, a bundle of the demo model, and one with a trained head."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.cli_helpers import invoke

SCENES = 40


def done(*words: object) -> None:
    outcome = invoke(*words, "--quiet")
    assert outcome.code == 0, outcome.err


@pytest.fixture(scope="session")
def demo_scenes(made_once) -> Path:
    """``images/`` and ``masks/`` of 40 scenes, and ``names.txt``, as examples/README.md makes them."""
    from phreg_deploy.demo.scenes import CLASSES, make_scene

    def make(folder: Path) -> None:
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        for seed in range(SCENES):
            for part, array in zip(("images", "masks"), make_scene(1000 + seed)):
                Image.fromarray(array).save(folder / part / f"{seed:04d}.png")
        (folder / "names.txt").write_text("\n".join(CLASSES))

    return made_once("demo-scenes", make)


@pytest.fixture(scope="session")
def demo_bundle(made_once, torch) -> Path:
    """The demo model in FP32, one image of 128 x 128."""
    from phreg_deploy.demo.pipeline import MODEL

    return made_once("demo-bundle", lambda folder: done("export", MODEL, "-o", folder))


@pytest.fixture(scope="session")
def demo_training(made_once, demo_bundle, demo_scenes) -> Path:
    """``features`` of the scenes, and ``head`` and ``printed.txt`` of examples/train_head.py on them."""
    import contextlib
    import io

    from examples.train_head import main

    def make(folder: Path) -> None:
        folder.mkdir()
        extract = ("--backend", "onnxruntime-cpu", "--fit", "squash", "--dtype", "float16")
        done("extract", demo_bundle, demo_scenes / "images", "-o", folder / "features", *extract)
        words = [folder / "features", "--masks", demo_scenes / "masks", "--classes", demo_scenes / "names.txt"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            main([*map(str, words), "-o", str(folder / "head"), "--epochs", "6"])
        (folder / "printed.txt").write_text(printed.getvalue())

    return made_once("demo-training", make)


@pytest.fixture(scope="session")
def labels_bundle(made_once, demo_bundle, demo_training) -> Path:
    """The demo model with the trained head, which serves labels of pixels."""
    head = demo_training / "head"
    return made_once(
        "labels-bundle",
        lambda folder: done("attach", demo_bundle, "--head", head, "-o", folder, "--labels", "--upsample"),
    )


@pytest.fixture(scope="session")
def alone_bundle(made_once, labels_bundle) -> Path:
    """``labels_bundle`` without features."""
    return made_once("alone-bundle", lambda folder: done("attach", labels_bundle, "--only-head", "-o", folder))


def printed_share(text: str, name: str) -> float:
    """The share, 0-1, that ``train_head`` printed after a name."""
    found = re.search(rf"{name} (\d+\.\d)%", text)
    assert found is not None, text
    return float(found[1]) / 100


@pytest.fixture(scope="session")
def pairs_bundle(made_once, base) -> Path:
    """The small base model in FP16, from 48 to 96 pixels a side, two to four images."""
    options = ("--image-size", "48:64:96", "--batch", "2:2:4", "--precision", "fp16")
    return made_once("pairs-bundle", lambda folder: done("export", base, "-o", folder, *options))
