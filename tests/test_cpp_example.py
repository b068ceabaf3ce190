"""examples/cpp: compiled, and compared with the runtime on the same bundles and images."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import ROOT, photograph
from tests.example_downloads import default_folder

SOURCE = ROOT / "examples" / "cpp" / "main.cpp"


@pytest.fixture(scope="module")
def compiled(made_once):
    """The compiled example, and what the compiler said. It links the library of the Python package onnxruntime."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    headers = default_folder() / "onnxruntime-headers"
    if not headers.is_dir():
        pytest.skip(f"no headers of ONNX Runtime in {headers}: fetch them with `python -m tests.example_downloads`")
    json_headers = Path(pytest.importorskip("nlohmann_json").__file__).parent / "include"
    own = Path(pytest.importorskip("onnxruntime").__file__).parent / "capi"
    library = next(own.glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip(f"no libonnxruntime.so in {own}")

    def make(folder):
        folder.mkdir()
        for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
            (folder / name).symlink_to(library)
        include = ("-I", headers, "-I", json_headers)
        link = ("-L", folder, "-lonnxruntime", f"-Wl,-rpath,{folder}", "-o", folder / "dense_features")
        command = [compiler, "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", SOURCE, *include, *link]
        subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)

    return made_once("cpp-example", make) / "dense_features"


@pytest.fixture
def run(compiled, tmp_path):
    """``run(bundle, *words, image=...)``: the array of the output file, or what was said on stderr."""

    def run(bundle, *words, image, code=0):
        output = tmp_path / "output.npy"
        done = subprocess.run(
            [str(word) for word in (compiled, bundle, image, output, *words)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return np.load(output) if code == 0 else done.stderr

    return run


@pytest.fixture
def ppm(tmp_path):
    def make(width, height):
        photograph(11, width, height).save(tmp_path / "photo.ppm")
        return tmp_path / "photo.ppm"

    return make


def across_first(image, width):
    """The image at a width. Pillow then resizes its height alone; by itself, 13 may begin with the height."""
    picture = Image.open(image)
    return picture.resize((width, picture.height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(128, 128), (301, 200), (90, 131)])
def test_features_are_the_runtimes(run, demo_bundle, ppm, size):
    image = ppm(*size)
    features = run(demo_bundle, image=image)
    with FeatureExtractor.load(demo_bundle, "onnxruntime-cpu") as extractor:
        expected = extractor(across_first(image, 128)).features
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("squash", 0.9), ("center", 0.9)])
def test_every_preprocessing_gives_the_runtimes_pixels(
    run, demo_bundle, ppm, tmp_path, interpolation, crop_mode, crop_pct
):
    image, changed = ppm(210, 157), tmp_path / "changed"
    shutil.copytree(demo_bundle, changed)
    steps = {"interpolation": interpolation, "crop_mode": crop_mode, "crop_pct": crop_pct}
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["preprocess"].update(steps)
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with FeatureExtractor.load(demo_bundle, "onnxruntime-cpu") as extractor:
        extractor.preprocess = replace(extractor.preprocess, **steps)
        expected = extractor(image).features
    np.testing.assert_allclose(run(changed, image=image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (80, 56)])
def test_a_range_of_sizes_in_half_precision_and_pairs(run, pairs_bundle, ppm, size):
    image = ppm(150, 100)
    features = run(pairs_bundle, "features", "{}x{}".format(*size), image=image)
    with FeatureExtractor.load(pairs_bundle, "onnxruntime-cpu") as extractor:
        expected = extractor(across_first(image, size[1]), size).features
    assert features.dtype == np.float16
    assert features.shape == expected.shape == (1, size[0] // 8, size[1] // 8, 48)
    np.testing.assert_allclose(features, expected, atol=0.01)


def test_labels_of_a_head(run, labels_bundle, alone_bundle, ppm):
    image = ppm(150, 100)
    labels = run(labels_bundle, "labels", image=image)
    np.testing.assert_array_equal(run(alone_bundle, "labels", image=image), labels)
    assert "has no output features" in run(alone_bundle, image=image, code=1)
    with FeatureExtractor.load(labels_bundle, "onnxruntime-cpu") as extractor:
        expected = extractor(across_first(image, 128)).labels
    assert labels.dtype == np.uint8
    assert labels.shape == expected.shape
    assert (labels == expected).mean() > 0.999


def test_mistakes_are_messages(run, demo_bundle, pairs_bundle, ppm, tmp_path):
    image, other = ppm(150, 100), tmp_path / "other"
    assert "has no output labels" in run(demo_bundle, "labels", image=image, code=1)
    for size in ("64x68", "40x64", "64", "104x64"):
        assert f"got the size {size}, expected HxW" in run(pairs_bundle, "features", size, image=image, code=1)
    assert "cannot be read" in run(demo_bundle, image=tmp_path / "none.ppm", code=1)
    assert "manifest.json cannot be read" in run(tmp_path, image=image, code=1)
    data = image.read_bytes()
    for changed, message in (
        (data[:-1], "truncated"),
        (b"P5" + data[2:], "no binary PPM"),
        (b"P6\n# x\n0 5 255\n", "no binary"),
    ):
        other.write_bytes(changed)
        assert message in run(demo_bundle, image=other, code=1)
    newer = tmp_path / "newer"
    shutil.copytree(demo_bundle, newer)
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format": 5}))
    assert "newer format" in run(newer, image=image, code=1)
    assert "expected BUNDLE IMAGE.ppm OUTPUT.npy" in run(demo_bundle, *["x"] * 4, image=image, code=1)


def test_the_source_is_short():
    lines = SOURCE.read_text().splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 120
