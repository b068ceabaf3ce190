"""Heads for the tests of bundles that serve them, and the fixtures that hold a bundle, a head and frames."""

import numpy as np
import pytest

from phreg_deploy.export import export
from phreg_deploy.heads import Head, attach

NAMES = ("road", "car", "tree", "sky", "person")
COLOURS = ((128, 64, 128), (0, 0, 142), (107, 142, 35), (70, 130, 180), (220, 20, 60))
WIDTH = 48


def head(outputs=5, width=WIDTH, seed=0, **facts):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, width)).astype(np.float32)
    return Head(weight, rng.standard_normal(outputs).astype(np.float32), **facts)


@pytest.fixture(scope="module")
def street():
    return head(classes=NAMES, colours=COLOURS, ignore=255)


@pytest.fixture(scope="module")
def ranging(student, tmp_path_factory):
    """A bundle for a range of sizes, two layers, one or two images."""
    folder = tmp_path_factory.mktemp("attach") / "bundle"
    return export(str(student), folder, image_size="48x64:64:96", batch="1:1:2", layers="1,2").folder


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(1).integers(0, 256, (2, 80, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def alone(bundle, street, tmp_path_factory):
    """Labels at a stride of 2 and nothing else."""
    folder = tmp_path_factory.mktemp("alone") / "alone.bundle"
    return attach(bundle, {"": street}, folder, labels=True, upsample="bilinear", stride=2, only_head=True).folder


@pytest.fixture(scope="module")
def beside(bundle, street, tmp_path_factory):
    """The same beside the features."""
    folder = tmp_path_factory.mktemp("beside") / "beside.bundle"
    return attach(bundle, {"": street}, folder, labels=True, upsample="bilinear", stride=2).folder
