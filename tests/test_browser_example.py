"""examples/browser in headless Chromium: features, similarity under the pointer, and what the page says of mistakes."""

import functools
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import ROOT
from tests.example_downloads import default_folder

EXAMPLE = ROOT / "examples" / "browser"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The server of ``python -m http.server``, without its log."""

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_bundle, pairs_bundle, alone_bundle, demo_scenes):
    """A copy of the example, with the npm package, bundles and a picture beside it."""
    web = default_folder() / "onnxruntime-web"
    if not web.is_dir():
        pytest.skip(f"no onnxruntime-web in {web}: fetch it with `python -m tests.example_downloads`")
    folder = tmp_path_factory.mktemp("site") / "browser"
    shutil.copytree(EXAMPLE, folder)
    (folder / "node_modules" / "onnxruntime-web").mkdir(parents=True)
    (folder / "node_modules" / "onnxruntime-web" / "dist").symlink_to(web)
    (folder / "demo.bundle").symlink_to(demo_bundle)
    (folder / "pairs.bundle").symlink_to(pairs_bundle)
    (folder / "alone.bundle").symlink_to(alone_bundle)
    shutil.copy(demo_scenes / "images" / "0004.png", folder / "scene.png")
    newer = json.loads((demo_bundle / "manifest.json").read_text()) | {"format": 5}
    (folder / "newer.bundle").mkdir()
    (folder / "newer.bundle" / "manifest.json").write_text(json.dumps(newer))
    return folder


@pytest.fixture(scope="module")
def site(folder):
    """The address at which the folder is served."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def opened(page, address):
    page.goto(address)
    page.wait_for_function("document.getElementById('said').textContent.includes('patches in')", timeout=60_000)
    return page


# What the module computes for a picture: its pixels, features and norms.
COMPUTE = """async ([folder, file]) => {
    const { DenseFeatures } = await import("./dense_features.js");
    const model = await DenseFeatures.load(folder);
    const picture = await createImageBitmap(await (await fetch(file)).blob());
    const pixels = model.pixels(picture);
    const map = await model.run(pixels);
    const arrays = [pixels, map.features, map.norms, map.similarity(3, 5)].map((array) => Array.from(array));
    return [...arrays, map.artifactRate];
}"""


def test_the_features_are_the_runtimes(page, site, demo_bundle):
    opened(page, f"{site}/index.html?image=scene.png")
    pixels, features, norms, similarity, rate = page.evaluate(COMPUTE, ["demo.bundle", "scene.png"])
    pixels = np.array(pixels, np.uint8).reshape(1, 128, 128, 3)
    with FeatureExtractor.load(demo_bundle, "onnxruntime-cpu") as extractor:
        dense = extractor.dense(pixels)
    features = np.array(features, np.float32).reshape(dense.features.shape)
    np.testing.assert_allclose(features, dense.features, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.array(norms).reshape(16, 16), dense.token_norm[0], rtol=1e-4)
    unit = dense.features[0] / np.linalg.norm(dense.features[0], axis=-1, keepdims=True)
    np.testing.assert_allclose(np.array(similarity).reshape(16, 16), unit @ unit[3, 5], atol=1e-4)
    assert rate == dense.artifact_rate[0] > 0


def test_a_bundle_in_eight_bits_runs_unchanged(page, site, folder, int8_bundle):
    (folder / "int8.bundle").symlink_to(int8_bundle)
    opened(page, f"{site}/index.html?bundle=int8.bundle&image=scene.png")
    pixels, features, *_ = page.evaluate(COMPUTE, ["int8.bundle", "scene.png"])
    with FeatureExtractor.load(int8_bundle, "onnxruntime-cpu") as extractor:
        expected = extractor.dense(np.array(pixels, np.uint8).reshape(1, 64, 64, 3)).features[0]
    features = np.array(features).reshape(expected.shape)
    cosine = (features * expected).sum(-1) / np.linalg.norm(features, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.mean() > 0.998
    assert cosine.min() > 0.98


def test_a_picture_of_the_models_size_is_read_pixel_by_pixel(page, site, demo_scenes):
    opened(page, f"{site}/index.html?image=scene.png")
    pixels = page.evaluate(COMPUTE, ["demo.bundle", "scene.png"])[0]
    scene = np.asarray(Image.open(demo_scenes / "images" / "0004.png"))
    np.testing.assert_array_equal(np.array(pixels, np.uint8).reshape(128, 128, 3), scene)


def test_the_page_shows_the_similarity_to_the_patch_under_the_pointer(page, site, demo_bundle, demo_scenes):
    opened(page, f"{site}/index.html?image=scene.png")
    assert page.inner_text("#said").startswith("16x16 patches in ")
    with FeatureExtractor.load(demo_bundle, "onnxruntime-cpu") as extractor:
        features = extractor(demo_scenes / "images" / "0004.png").features[0]
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    box = page.locator("#picture").bounding_box()
    shown = """() => {
        const heat = document.getElementById("heat");
        return Array.from(heat.getContext("2d").getImageData(0, 0, heat.width, heat.height).data);
    }"""
    for row, column in ((2, 3), (12, 9)):
        page.mouse.move(box["x"] + box["width"] * (column + 0.5) / 16, box["y"] + box["height"] * (row + 0.5) / 16)
        colours = np.array(page.evaluate(shown)).reshape(16, 16, 4)
        cosine = np.clip(unit @ unit[row, column], 0, 1)
        fade = 255 * (1 - np.abs(2 * cosine - 1))
        cool = cosine < 0.5
        expected = np.stack([np.where(cool, fade, 255), fade, np.where(cool, 255, fade)], axis=-1)
        assert np.abs(colours[..., :3] - expected).max() <= 2
        assert tuple(colours[row, column, :3]) == (255, 0, 0)
    page.mouse.move(5, 5)
    assert not any(page.evaluate(shown))


def test_a_chosen_file_is_shown_with_its_aspect(page, site, tmp_path, demo_scenes):
    page.goto(f"{site}/index.html")
    page.wait_for_function("document.getElementById('said').textContent === 'Choose a picture.'", timeout=60_000)
    Image.open(demo_scenes / "images" / "0004.png").resize((300, 150)).save(tmp_path / "wide.png")
    page.set_input_files("#file", tmp_path / "wide.png")
    page.wait_for_function("document.getElementById('said').textContent.includes('patches in')", timeout=60_000)
    box = page.locator("#picture").bounding_box()
    assert box["width"] == pytest.approx(2 * box["height"], abs=1)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("bundle=nothing", "There is no bundle at nothing (404)."),
        ("bundle=newer.bundle", "The bundle has format 5; this page knows 4."),
        ("bundle=pairs.bundle", "This page serves bundles of one fixed size; export one."),
        ("bundle=alone.bundle", "This page draws features, and the bundle serves its heads alone."),
        ("image=none.png", "none.png is not there (404)."),
    ],
)
def test_the_page_says_what_is_wrong(page, site, query, message):
    page.goto(f"{site}/index.html?{query}")
    page.wait_for_function("text => document.getElementById('said').textContent === text", arg=message, timeout=60_000)
