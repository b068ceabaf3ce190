"""``explore`` and ``check --report``: packed features, what the page holds, and what is refused."""

import json
import re

import numpy as np
import pytest

from phreg_deploy.explorer import explore
from phreg_deploy.explorer.packing import array, pack
from phreg_deploy.explorer.page import render
from tests.broken_bundles import BrokenBundle, scale_outputs
from tests.cli_helpers import invoke, run_python

pytestmark = pytest.mark.usefixtures("torch")
HERE = ("--backend", "onnxruntime-cpu", "--threads", "1")
BLOCKED = ("torch", "timm", "onnx", "onnxscript", "safetensors", "torchvision")


def data_of(page):
    """The JSON that the page's scripts read."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    assert not re.search(r"\b(NaN|Infinity)\b", re.sub(r'"[^"]*"', "", text)), "JSON has no such numbers"
    return json.loads(text)


def draw(channels, tokens=64, models=2):
    """Features of some models with a mean, a fast spectrum, and a few outliers."""
    rng = np.random.default_rng(0)
    scale = 4 / np.arange(1, channels + 1)
    features = {f"m{i}": rng.standard_normal((3, 8, tokens // 8, channels)) * scale + 0.5 for i in range(models)}
    features["m0"][:, 0, 0] *= 30
    return features


@pytest.mark.parametrize(("budget", "most"), [(0, 0.3), (4 * 64 * 96, 0.12), (10**9, 0.02)])
def test_packed_cosines_are_those_of_the_features(budget, most):
    features = draw(96)
    features["near"] = features["m1"] + 1e-7
    packed = pack(features, "m1", budget)
    assert packed.codes["m0"].shape == (len(packed.offset), 3, 8, 8)
    assert packed.origin == {"m0": None, "m1": None, "near": "m1"}
    for name, value in features.items():
        unit = value / np.linalg.norm(value, axis=-1, keepdims=True)
        exact = np.einsum("mabc,mdec->mabde", unit, unit)
        shown = packed.vectors(name)
        errors = np.abs(np.einsum("mabc,mdec->mabde", shown, shown) - exact)
        assert errors.max() <= packed.error_max * 1.5
        assert np.quantile(errors, 0.99) <= packed.error_p99 * 1.5
        stored = packed.stored(name)
        assert stored.dtype == np.int8
        np.testing.assert_array_equal(stored + (packed.codes["m1"] if name == "near" else 0), packed.codes[name])
    assert packed.error_max < most
    assert 0.5 < packed.kept < 1
    written = sum(len(array(packed.stored(name))["data"]) for name in features)
    assert budget == 0 or written < 1.34 * 1.25 * budget


def test_broken_features_can_be_packed():
    features = draw(32)
    features["m1"][0, 1, 1, 3] = np.nan
    assert np.isfinite(pack(features, "m1", 10**9).vectors("m1")).all()


def test_arrays_are_little_endian():
    import base64
    import zlib

    written = array(np.arange(3, dtype=">f4"))
    assert (written["dtype"], written["shape"]) == ("float32", [3])
    assert np.frombuffer(zlib.decompress(base64.b64decode(written["data"])), "<f4").tolist() == [0, 1, 2]


def test_a_bundle_alone_needs_no_torch(bundle, int8_bundle, photos, tmp_path):
    """Two bundles: the first is the reference of the second, which has sensitivities."""
    code = (
        "import sys\n"
        "for name in sys.argv[1].split(','):\n    sys.modules[name] = None\n"
        "from tests.cli_helpers import invoke\n"
        "done = invoke(*sys.argv[2:])\n"
        "print(done.code, done.err[-500:])\n"
    )
    page = tmp_path / "page.html"
    words = ["explore", bundle, int8_bundle, "--images", photos, "--limit", "5", "--pictures", "3", *HERE]
    said = run_python(code, ",".join(BLOCKED), *words, "--latency", "0.1", "-o", page, "--quiet")
    assert said.split() == ["0"], said
    text = page.read_text(encoding="utf-8")
    data = data_of(text)
    assert data["models"] == ["fixed", "int8"]
    assert len(data["images"]) == 3
    assert data["heads"] == []
    assert list(data["charts"]["percentiles"]) == ["int8 and fixed"]
    layers = data["charts"]["sensitivity"]["int8"]
    assert [layer["name"] for layer in layers] == [
        layer["name"] for layer in json.loads((int8_bundle / "calibration.json").read_text())["layers"]
    ]
    assert text.count("<td>extractor</td>") == 2
    assert "phreg-deploy check" in text
    assert json.loads((bundle / "manifest.json").read_text())["files"]["model.onnx"] in text


def test_the_worst_images_are_shown(bundle, student, base, photos, tmp_path):
    words = ["--reference", student, "--base", base, "--images", photos, *HERE, "--json"]
    page = tmp_path / "page.html"
    document = invoke("explore", bundle, *words, "--limit", "6", "--pictures", "2", "-o", page).document
    (checked,) = document["bundles"]
    worst = [row["image"] for row in checked["by_image"]["images"]]
    assert len(worst) == 6
    assert document["shown"] == worst[:2]
    cosines = [row["cosine_p1"] for row in checked["by_image"]["images"]]
    assert cosines == sorted(cosines)
    data = data_of(page.read_text(encoding="utf-8"))
    assert data["models"] == ["base", "student", "bundle"]
    assert [chart["block"] for chart in data["charts"]["norms"]] == [1, 2, 3]
    assert set(data["charts"]["norms"][-1]["shares"]) == {"base", "student", "bundle"}
    assert data["charts"]["norms"][-1]["largest"]["base"] > 5 > data["charts"]["norms"][-1]["largest"]["student"]
    same = invoke("check", bundle, *words, "--limit", "6").document
    assert checked["gates"] == same["gates"]
    assert checked["artifacts"] == same["artifacts"]


def test_a_missed_gate_is_on_the_page(bundle, photos, tmp_path):
    page = tmp_path / "page.html"
    done = invoke("explore", bundle, "--images", photos, "--limit", "1", "--cosine", "1", *HERE, "-o", page, "--json")
    assert (done.code == 3) == (" missed</strong>" in page.read_text(encoding="utf-8"))
    done = invoke("check", bundle, "--outlier-points", "-1", *HERE, "--report", page)
    assert done.code == 3
    text = page.read_text(encoding="utf-8")
    assert "✗ 1 gate missed" in text or "✗ 2 gates missed" in text
    assert "<td>✗ missed</td>" in text
    assert "1st-percentile patch cosine 1.0000000, expected at least" in text
    assert "No photographs were given" in text
    assert "models" not in data_of(text)


@pytest.mark.parametrize("outputs", [{"features": float("nan")}, {"features": 0.0, "token_norm": float("inf")}])
def test_a_bundle_that_answers_nonsense_gets_a_page(bundle, student, photos, tmp_path, outputs):
    broken = BrokenBundle(bundle, tmp_path / "broken")
    scale_outputs(broken, **outputs)
    page = tmp_path / "page.html"
    words = ["explore", broken.save(), "--reference", student, "--images", photos, "--limit", "2", *HERE, "-o", page]
    done = invoke(*words, "--json")
    assert done.code == 3, done.err
    data = data_of(page.read_text(encoding="utf-8"))
    assert data["models"] == ["student", "bundle"]
    assert " missed</strong>" in page.read_text(encoding="utf-8")


def test_the_page_has_no_outside_addresses_and_no_way_out_of_its_scripts(bundle, photos):
    exploration = explore([bundle], images=photos, limit=1, backend="onnxruntime-cpu")
    hostile = "</script><script>alert(1)</script>$x"
    from dataclasses import replace

    maps = replace(exploration.maps, names=(hostile,))
    text = render(replace(exploration, maps=maps, commands=(f"phreg-deploy {hostile}",)))
    assert "alert(1)</script>" not in text
    assert data_of(text)["images"][0]["name"] == hostile
    # The rest is text: the address of uPlot in its own head line.
    assert not re.findall(r"""(?:src|href|action|url)\s*[=(]\s*["']?(?:https?:)?//""", text)
    assert len(text) < 400_000


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (["{bundle}", "-o", "{tmp}/p.html", "--images", "{tmp}/none"], ["images: got"]),
        (["{bundle}", "-o", "{tmp}", "--images", "{photos}"], ["output: got the folder"]),
        (["{bundle}", "-o", "{tmp}/no/p.html", "--images", "{photos}"], ["output: there is no folder"]),
        (["{tmp}/none", "-o", "{tmp}/p.html", "--images", "{photos}"], ["there is no"]),
        (["{bundle}", "-o", "{tmp}/p.html", "--images", "{photos}", "--base-checkpoint", "x.safetensors"], ["--base"]),
        (["{bundle}", "{other}", "-o", "{tmp}/p.html", "--images", "{photos}"], ["differ in the input size"]),
    ],
)
def test_bad_arguments_are_refused(world, request, words, sentences):
    names = {"bundle": world.bundle, "tmp": world.tmp, "photos": world.photos}
    if "{other}" in words:
        names["other"] = request.getfixturevalue("demo_bundle")
    done = invoke("explore", *(word.format(**names) for word in words), "--limit", "1", "--json", *HERE)
    done.refused(2, *sentences)
    assert not (world.tmp / "p.html").exists()
