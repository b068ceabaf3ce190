"""examples/train_head.py: a head trained in PyTorch on cached features, attached to the bundle they came from."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from examples.train_head import CachedFeatures, LinearHead, main
from phreg_deploy.heads import Head
from phreg_deploy.runtime import FeatureExtractor
from tests.example_fixtures import printed_share


def test_the_head_is_good_and_attached_it_gives_its_own_labels(demo_training, demo_scenes, labels_bundle):
    printed = (demo_training / "printed.txt").read_text()
    accuracy = printed_share(printed, "pixel accuracy")
    assert accuracy > 0.8
    assert printed_share(printed, "mean IoU") > 0.4
    head = Head.read(demo_training / "head")
    assert head.trained_on["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    held, right = range(4, 40, 5), []
    with FeatureExtractor.load(labels_bundle, "onnxruntime-cpu") as extractor:
        for number in held:
            dense = extractor(demo_scenes / "images" / f"{number:04d}.png")
            assert (dense.labels[0] == head.labels(dense.features, (128, 128))[0]).mean() > 0.999
            right.append(dense.labels[0] == np.asarray(Image.open(demo_scenes / "masks" / f"{number:04d}.png")))
    assert np.mean(right) == pytest.approx(accuracy, abs=0.005), "the bundle is as good as the printed figure says"


def test_the_folded_head_computes_what_the_module_computes():
    torch.manual_seed(1)
    model = LinearHead(12, 4)
    with torch.no_grad():
        for _ in range(3):
            model(3 + 2 * torch.randn(2, 12, 5, 6), (5, 6))
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.normal_()
        features = torch.randn(2, 12, 5, 6)
        expected = model.eval()(features, (5, 6)).permute(0, 2, 3, 1).numpy()
    head = Head(*model.folded(), classes=("a", "b", "c", "d"))
    np.testing.assert_allclose(head.logits(features.permute(0, 2, 3, 1).numpy()), expected, atol=1e-5)


@pytest.mark.parametrize("change", ["no index", "cropped", "no masks", "colours", "names"])
def test_what_it_cannot_use_is_a_message(demo_training, demo_scenes, tmp_path, change):
    features, masks, names = tmp_path / "features", tmp_path / "masks", tmp_path / "names.txt"
    shutil.copytree(demo_training / "features", features)
    shutil.copytree(demo_scenes / "masks", masks)
    names.write_text("sky\nground\n" if change == "names" else (demo_scenes / "names.txt").read_text())
    index = features / "features.json"
    if change == "no index":
        index.unlink()
    elif change == "cropped":
        facts = json.loads(index.read_text())
        facts["settings"]["fit"] = "crop"
        index.write_text(json.dumps(facts))
    elif change == "no masks":
        shutil.rmtree(masks)
    elif change == "colours":
        for path in masks.iterdir():
            Image.open(path).convert("RGB").save(path)
    message = {
        "no index": "holds no features.json",
        "cropped": "extract them with --fit squash",
        "no masks": "holds no mask of the images, e.g. no 0000.png",
        "colours": "has the mode RGB",
        "names": "names 2 classes, and the masks have values up to 8",
    }[change]
    words = [str(features), "--masks", str(masks), "--classes", str(names), "-o", str(tmp_path / "head")]
    with pytest.raises(SystemExit, match=message):
        main(words)
    assert not (tmp_path / "head").exists()


def test_an_item_is_features_and_the_classes_of_its_own_image(demo_training, demo_scenes):
    data = CachedFeatures(demo_training / "features", demo_scenes / "masks", 255)
    values, truth = data[7]
    assert (len(data), values.shape, truth.shape) == (40, (128, 16, 16), (128, 128))
    np.testing.assert_array_equal(truth, np.asarray(Image.open(demo_scenes / "masks" / "0007.png")))
