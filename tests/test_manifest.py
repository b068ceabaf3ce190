"""Manifests with correct hashes and wrong content are refused, and older and foreign ones are read."""

import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests.bundle_changes import edit_graph, rewrite_bundle, write_hashes


def load(folder):
    return FeatureExtractor.load(folder, "onnxruntime-cpu", threads=1)


def change_manifest(w, name, path, value):
    """Copy a bundle, and change the manifest's value at a dotted path; None removes the key."""
    folder = w.copy(name)
    data = json.loads((folder / "manifest.json").read_text())
    place, keys = data, path.split(".")
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    if value is None:
        del place[keys[-1]]
    else:
        place[int(keys[-1]) if isinstance(place, list) else keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(data))
    return folder


# Plausible values: only the graph's metadata contradicts them.
EDITED = {
    "preprocess.crop_pct": 0.5,
    "preprocess.crop_mode": "center",
    "preprocess.interpolation": "nearest",
    "preprocess.mean": [0.1, 0.1, 0.1],
    "norm_median": 1,
    "precision": "fp16",
    "model.registers": 3,
    "model.heads": 2,
    "source.model": "another",
    "random_weights": True,
    "float_parts": ["everything"],
    "versions.onnx": "0",
}
EDITED_WIDE = {"sizes.sizes.1": [96, 96], "sizes.sizes.2": [640, 640], "batches.highest": 64, "batches.best": 3}


@pytest.mark.parametrize(("which", "path"), [("bundle", p) for p in EDITED] + [("wide_bundle", p) for p in EDITED_WIDE])
@pytest.mark.parametrize("command", ["check", "inspect"])
def test_an_edit_that_the_graph_contradicts_is_refused(world, run_cli, command, which, path):
    folder = change_manifest(world, which, path, {**EDITED, **EDITED_WIDE}[path])
    run_cli(command, folder, "--json").refused(2, "manifest.json and model.onnx disagree on " + path.split(".")[0])


ABSURD = {
    "files": {},
    "files.model.onnx": 3,
    "model.patch": [0, 8],
    "model.width": "48",
    "model.depth": -1,
    "model.heads": 1.5,
    "model.class_token": 1,
    "model.registers": 1e99,
    "model.family": ["vit"],
    "model.architecture": {},
    "model.parameters": None,
    "preprocess.crop_pct": 0.01,
    "preprocess.crop_mode": [],
    "preprocess.std": [0, 1, 1],
    "preprocess.mean": [[1], 2, 3],
    "sizes.mode": {},
    "sizes.sizes": [[64.5, 64]],
    "sizes.sizes.0": [65, 64],
    "sizes": {"mode": "fixed", "sizes": []},
    "batches.lowest": 100_000,
    "batches.highest": 0,
    "batches": {"lowest": 2, "best": 1, "highest": 3},
    "precision": ["fp32"],
    "opset": "20",
    "inputs": {},
    "outputs.features": [],
    "outputs.features.shape": [1, 8, 8],
    "outputs.cls": None,
    "outputs.features.dtype": "object",
    "source": {},
    "source.weights_sha256": 7,
    "versions": {"onnx": 1},
    "norm_median": float("nan"),
    "float_parts": [1],
    "random_weights": 0,
    "quantisation": {},
    "format": True,
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("path", ABSURD)
def test_absurd_values_are_refused(world, path, verify):
    value = ABSURD[path]
    if path == "files.model.onnx":
        data = json.loads((world.bundle / "manifest.json").read_text())
        path, value = "files", data["files"] | {"model.onnx": value}
    folder = change_manifest(world, "bundle", path, value)
    with pytest.raises(PhregError) as caught:
        FeatureExtractor.load(folder, "onnxruntime-cpu", verify=verify)
    assert "manifest.json" in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "path", ["quantisation.fidelity", "quantisation.missed", "quantisation.images", "quantisation.target"]
)
def test_absurd_values_of_a_calibration_are_refused(world, run_cli, path):
    for value in ("x", 7, [], None):
        folder = change_manifest(world, "int8_bundle", path, value)
        if (path, value) != ("quantisation.missed", []):
            run_cli("inspect", folder, "--json").refused(2, "manifest.json", path)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": 1e999}', '{"format": "\\ud800"}', "\ufeff{}"]
)
def test_json_that_python_cannot_parse_is_refused(world, run_cli, text):
    folder = world.copy("bundle", manifest=text.encode())
    run_cli("inspect", folder, "--json").refused(2, "manifest.json")
    student = world.copy("student", phreg=text.encode())
    run_cli("inspect", student, "--json").refused(2, "phreg.json")
    if "1e999" not in text:  # valid in a configuration
        (student / "phreg.json").unlink()
        (student / "config.json").write_text(text)
        run_cli("inspect", student, "--json").refused(2, "config.json")


@pytest.mark.parametrize("missing", ["model.onnx", "reference.npz", "pos_embed.npy"])
def test_every_required_file_needs_a_hash(world, missing):
    files = json.loads((world.wide_bundle / "manifest.json").read_text())["files"]
    folder = change_manifest(world, "wide_bundle", "files", {k: v for k, v in files.items() if k != missing})
    with pytest.raises(PhregError, match=f"no hash of {missing}"):
        Bundle.read(folder)


NAMES = ["../../etc/passwd", "/etc/passwd", "/proc/kmsg", "..", ".", "", "a/b", "a\\b", "x" * 300, "a\nb", "a\0b"]


@pytest.mark.parametrize("name", NAMES)
def test_only_bare_names_are_files(world, run_cli, name):
    files = json.loads((world.bundle / "manifest.json").read_text())["files"] | {name: "0" * 64}
    run_cli("inspect", change_manifest(world, "bundle", "files", files), "--json").refused(
        2, "manifest.json", "bare name"
    )


@pytest.mark.parametrize("name", ["model.onnx", "reference.npz", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "link to the kernel", "folder"])
def test_only_regular_files_are_read(world, run_cli, name, kind):
    folder = world.copy("bundle")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        try:
            os.mknod(folder / name, 0o20600, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero" if "device" in kind else "/proc/self/maps")
    started = time.perf_counter()
    run_cli("inspect", folder, "--json").refused(2, str(folder))
    assert time.perf_counter() - started < 5


def test_links_to_files_are_read(world):
    """Every file of a snapshot in the cache of a model hub is a link."""
    folder = world.copy("bundle")
    (folder / "model.onnx").rename(world.tmp / "blob")
    (folder / "model.onnx").symlink_to("../blob")
    Bundle.read(folder).verify()


def test_no_part_of_another_files_hash_is_printed(world, run_cli):
    folder = world.copy("bundle")
    (world.tmp / "secret").write_text("a password")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("../secret")
    outcome = run_cli("inspect", folder, "--json")
    outcome.refused(2, "another sha256")
    assert hashlib.sha256(b"a password").hexdigest()[:8] not in outcome.err + outcome.out


def test_paths_that_are_too_long_are_refused(world, run_cli):
    long = world.tmp / ("x" * 300)
    deep = world.tmp / ("d/" * 3000)
    for path in (long, deep):
        run_cli("inspect", path, "--json").refused(2, "there is nothing")
        run_cli("check", path, "--json").refused(2, "there is nothing")
        run_cli("extract", world.bundle, world.photos, "-o", path, "--json").refused(2, "output")
        run_cli("export", path, "-o", world.out, "--json").refused(2, "there is nothing", "or a timm name")


@pytest.mark.parametrize("key", ["pretrained_cfg", "model_args"])
@pytest.mark.parametrize("value", [7, [], "x", None])
def test_a_students_configuration_of_other_types_is_refused(world, run_cli, key, value):
    def change(data):
        return json.dumps(json.loads(data) | {key: value}).encode()

    run_cli("export", world.copy("student", config=change), "-o", world.out, "--json").refused(2, "config.json", key)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("median", ["x", -1, 0, [], True])
def test_a_students_median_of_another_type_is_refused(world, run_cli, median):
    def change(data):
        record = json.loads(data)
        record["scores"]["median_norm"] = median
        return json.dumps(record).encode()

    student = world.copy("student", phreg=change)
    run_cli("export", student, "-o", world.out, "--json").refused(2, "phreg.json", "median norm")


def test_a_bundle_of_the_first_format_is_read(world):
    """Its graph and its manifest say nothing of quantisation."""

    def change(model):
        kept = {e.key: e.value for e in model.metadata_props if e.key != "phreg.quantisation"} | {"phreg.format": "1"}
        model.ClearField("metadata_props")
        for key, value in kept.items():
            model.metadata_props.add(key=key, value=value)

    folder = change_manifest(world, "bundle", "quantisation", None)
    data = json.loads((folder / "manifest.json").read_text()) | {"format": 1}
    (folder / "manifest.json").write_text(json.dumps(data))
    (folder / "model.onnx").write_bytes(edit_graph(change)((folder / "model.onnx").read_bytes()))
    with load(write_hashes(folder)) as extractor:
        assert extractor.manifest.quantisation is None


def test_another_exporters_bundle_is_read(world):
    """An unusual value is accepted if manifest and graph agree on it."""
    folder = rewrite_bundle(world.copy("bundle"), norm_median=1.5)
    with load(folder) as extractor:
        assert extractor(np.zeros((64, 64, 3), np.uint8)).norm_median == 1.5


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("option", "value"), [("--batch", "2000"), ("--batch", "1:8:100000"), ("--image-size", "20000")]
)
def test_an_export_beyond_what_can_be_read_is_refused_at_once(world, run_cli, option, value):
    run_cli("export", world.student, "-o", world.out, option, value, "--json").refused(2, "expected")
    assert not world.out.exists()
