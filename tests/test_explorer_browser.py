"""The page of ``explore`` in headless Chromium, opened from disk: clicks, keys, layers, labels, themes, no network."""

import io
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.explorer import explore
from phreg_deploy.images.overlays import voc_colours
from phreg_deploy.images.pictures import HEAT
from phreg_deploy.runtime import FeatureExtractor
from tests.head_helpers import NAMES, head

pytestmark = pytest.mark.usefixtures("torch")
MODELS = ("base", "student", "bundle")
GRID = 8  # patches a side


@pytest.fixture(scope="module")
def labelled(made_once, student):
    """A bundle of two layers with a head of five classes, enlarged to a class for each 4 x 4 pixels."""
    from phreg_deploy.export import export
    from phreg_deploy.heads import attach

    def make(folder):
        layered = export(str(student), folder.with_name("explored-layers"), layers="1,2").folder
        attach(layered, {"": head(classes=NAMES, ignore=255)}, folder, upsample="bilinear", stride=4, labels=True)

    return made_once("explored", make)


@pytest.fixture(scope="module")
def explored(tmp_path_factory, labelled, student, base, photos):
    """The page of base, student and bundle on three of five photographs, and the exploration."""
    path = tmp_path_factory.mktemp("explored") / "page.html"
    models = {"reference": str(student), "base": str(base)}
    return path, explore(
        [labelled], images=photos, limit=5, pictures=3, backend="onnxruntime-cpu", output=path, **models
    )


@pytest.fixture
def opened(page, explored):
    """The page, and what it asked the network for, which must be nothing."""
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(explored[0].as_uri())
    page.evaluate("window.ready")
    yield page
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def click(page, row, column, name="base, token norms"):
    place = page.locator(f'[aria-label^="{name}"]')
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    place.click(position={"x": box["width"] * (column + 0.5) / GRID, "y": box["height"] * (row + 0.5) / GRID})


def similarities(page):
    """What the page shows: by model the cosines, and the pixels of the map."""
    return page.evaluate(
        """() => explorer.views.map(({similarity: {model, canvas}}) => [model,
            Array.from(explorer.shown[model].similarity),
            Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data)])"""
    )


def exact(exploration, model, output, image, row, column):
    features = exploration.maps.outputs[model][output][image].astype(np.float64)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    return unit @ unit[row, column]


def heat_of(values):
    place = np.clip(values, 0, 1) * (len(HEAT) - 1)
    below = np.minimum(place.astype(int), len(HEAT) - 2)
    return HEAT[below] + (HEAT[below + 1] - HEAT[below]) * (place - below)[..., None]


def test_a_click_shows_the_similarities_that_numpy_computes(opened, explored):
    _, exploration = explored
    error = opened.evaluate("explorer.packed[''].error_max")
    assert error < 0.02
    for row, column in ((0, 0), (5, 2)):
        click(opened, row, column)
        shown = similarities(opened)
        assert [model for model, *_ in shown] == list(MODELS)
        for model, cosines, pixels in shown:
            cosines = np.array(cosines).reshape(GRID, GRID)
            np.testing.assert_allclose(cosines, exact(exploration, model, "features", 0, row, column), atol=1.5 * error)
            drawn = np.array(pixels).reshape(GRID, GRID, 4)[..., :3]
            assert np.abs(drawn - heat_of(cosines)).max() <= 1
            assert cosines[row, column] == pytest.approx(1, abs=1e-5)
    mark = opened.locator(".mark").first
    assert mark.evaluate("(e) => [e.style.top, e.style.left]") == ["62.5%", "25%"]


def test_the_maps_are_those_of_the_bundle(opened, explored, photos):
    _, exploration = explored
    maps = exploration.maps
    bundle = exploration.bundles[0].check.bundle
    with FeatureExtractor.load(bundle, "onnxruntime-cpu") as extractor:
        dense = extractor(photos / maps.names[1])
    opened.keyboard.press("n")
    assert opened.evaluate("explorer.state.image") == 1
    norms = opened.evaluate("Array.from(explorer.shown.bundle.norms)")
    np.testing.assert_allclose(np.array(norms).reshape(GRID, GRID), dense.token_norm[0] / maps.median, rtol=1e-5)
    click(opened, 2, 6)
    cells = opened.locator("#readout tbody tr").nth(2).locator("td").all_inner_texts()
    assert cells[0].startswith(f"{dense.token_norm[0, 2, 6] / maps.median:.3f}"[:4])
    assert float(cells[2]) == pytest.approx(1, abs=1e-5)
    place = (np.array([2, 6]) + 0.5) / GRID * dense.labels.shape[1]
    assert cells[3] == NAMES[dense.labels[0, int(place[0]), int(place[1])]]
    assert opened.locator("#readout tbody tr").nth(0).locator("td").all_inner_texts()[3] == "-"


def test_arrow_keys_move_the_patch_and_are_spoken(opened):
    click(opened, 0, 0, "student, similarity")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp"):
        opened.keyboard.press(key)
    assert opened.evaluate("[explorer.state.row, explorer.state.column]") == [0, 2]
    assert opened.inner_text("#said").startswith("Row 0, column 2: base norm")
    opened.keyboard.press("p")
    assert opened.evaluate("explorer.state.image") == 2


def test_the_slider_shows_other_layers(opened, explored):
    _, exploration = explored
    assert opened.locator("#layer-control").is_visible()
    opened.locator("#layer").focus()
    opened.keyboard.press("Home")
    assert opened.inner_text("#layer-name") == "layer 1"
    click(opened, 3, 3)
    error = opened.evaluate("explorer.packed['1'].error_max")
    for model, cosines, _ in similarities(opened):
        expected = exact(exploration, model, "features.1", 0, 3, 3)
        np.testing.assert_allclose(np.array(cosines).reshape(GRID, GRID), expected, atol=1.5 * error)
    opened.keyboard.press("n")
    assert opened.evaluate("explorer.state.layer") == 0


def test_labels_lie_over_the_photograph(opened, explored):
    _, exploration = explored
    labels = exploration.maps.outputs["bundle"]["labels"][0]
    assert opened.locator("#head option").all_inner_texts() == ["labels"]
    assert opened.locator("#legend").inner_text().split() == list(NAMES)
    opened.locator("#opacity").focus()
    opened.keyboard.press("End")
    opaque = opened.evaluate(
        """() => { const canvas = explorer.views[2].image.canvas;
            return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data); }"""
    )
    opaque = np.array(opaque).reshape(64, 64, 4)[2::4, 2::4, :3]
    assert np.abs(opaque - np.array(voc_colours())[labels]).max() <= 1


def test_difference_maps_have_the_reference_that_is_chosen(opened, explored):
    _, exploration = explored
    a, b = (exploration.maps.outputs[m]["features"][0].astype(np.float64) for m in ("base", "bundle"))
    opened.select_option("#against", label="base")
    shown = np.array(opened.evaluate("Array.from(explorer.shown.bundle.difference)")).reshape(GRID, GRID)
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(shown, 1 - (a * b).sum(-1) / size, atol=1e-6)
    assert opened.evaluate("explorer.shown.base.difference") is None
    worst = opened.locator("button[data-image]").nth(2)
    worst.click()
    assert opened.evaluate("explorer.state.image") == 2


def brightness(screenshot):
    return np.asarray(Image.open(io.BytesIO(screenshot)).convert("L")).mean()


def test_charts_and_themes(opened):
    assert opened.locator("#norm-charts canvas").count() == 3
    assert opened.locator("#percentile-charts canvas").count() == 1
    assert opened.locator("#int8").is_hidden()
    names = opened.locator("#norm-charts [role=img]").evaluate_all("all => all.map(e => e.ariaLabel)")
    assert [re.match(r"Norms after block \d: base up to [\d.]+ medians, student", name) is not None for name in names]
    ground = "getComputedStyle(document.body).backgroundColor"
    light = opened.evaluate(ground)
    assert brightness(opened.screenshot()) > 200
    opened.click("#theme")
    dark = opened.evaluate(ground)
    assert (light, dark) == ("rgb(250, 250, 248)", "rgb(22, 24, 27)")
    assert opened.inner_text("#theme") == "Light"
    assert brightness(opened.screenshot()) < 90
    opened.emulate_media(color_scheme="dark")
    opened.reload()
    opened.evaluate("window.ready")
    assert opened.evaluate(ground) == dark


def test_everything_has_a_name(opened):
    """Images have texts, controls and maps have names, headings come in order, and there is one of each landmark."""
    unnamed = opened.evaluate(
        """() => [...document.querySelectorAll("img, button, input, select, canvas, [tabindex='0'].map")].filter((e) =>
            !(e.alt || e.ariaLabel || e.textContent.trim() || e.labels?.length || e.title ||
              e.closest("[role=img][aria-label], [role=application][aria-label]"))).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    levels = opened.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [opened.locator(name).count() for name in ("header", "main", "footer")] == [1, 1, 1]


def test_a_page_without_images_and_one_in_eight_bits(page, int8_bundle, tmp_path):
    path = tmp_path / "page.html"
    explore([int8_bundle], backend="onnxruntime-cpu", output=path)
    page.goto(path.as_uri())
    page.evaluate("window.ready")
    assert page.locator("#maps").is_hidden()
    assert page.locator("#int8 canvas").count() == 1
    layers = json.loads((int8_bundle / "calibration.json").read_text())["layers"]
    assert page.locator("#int8 tbody tr").count() >= len(layers)
    assert page.locator("#verdict ~ .verdict").inner_text().startswith("✓ All gates passed")
