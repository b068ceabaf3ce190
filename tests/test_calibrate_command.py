"""``calibrate`` and ``export --precision int8``: the bundles they write, the input they refuse, and missed bars."""

import importlib
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.runtime.parity import compare_runs, missed_gates, run_exam
from tests.bundle_changes import rewrite_bundle, write_hashes
from tests.cli_helpers import leftovers, photograph

pytestmark = pytest.mark.usefixtures("torch", "traced_once")


calibrator = importlib.import_module("phreg_deploy.calibration.calibrator")


LAYERS = [f"blocks.{i}.{part}" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture
def quick(monkeypatch):
    """Try only the first smoothing, for tests that do not test the search."""
    monkeypatch.setattr(importlib.import_module("phreg_deploy.calibration.search"), "CANDIDATES", ())


def command(w, *more, bundle=None, output=None):
    return ["calibrate", bundle or w.bundle, "--images", w.photos, "-o", output or w.out, *more, "--json"]


def export(w, *more):
    return ["export", w.student, "-o", w.out, *more, "--json"]


def export_int8(w, *more):
    return export(w, "--precision", "int8", "--images", w.photos, *more)


def damaged(w, change):
    """Copy the bundle with a changed graph and correct hashes."""
    folder = w.copy("bundle")
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    return write_hashes(folder)


def write_nan(name):
    def change(model):
        (tensor,) = (i for i in model.graph.initializer if i.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[5] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return change


def remove_names(model):
    for i, node in enumerate(model.graph.node):
        node.name = f"node_{i}"


def make_images(w, copies):
    folder = w.tmp / "few"
    folder.mkdir()
    for i in range(copies):
        photograph(0 if copies > 7 else i, 64, 64).save(folder / f"{i}.png")
    return folder


def test_a_calibrated_bundle_records_its_calibration(world, run_cli, photos):
    outcome = run_cli(*command(world))
    assert outcome.code == 0, outcome.err
    report = outcome.document
    stored = json.loads((world.out / "calibration.json").read_text())
    assert {**report, "output": None, "seconds": 0} == {**stored, "output": None, "seconds": 0}
    files = {"manifest.json", "model.onnx", "reference.npz", "calibration.json", "README.md"}
    assert {p.name for p in world.out.iterdir()} == files
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    assert sum(layer["macs"] for layer in report["layers"]) == pytest.approx(1)
    for layer in report["layers"]:
        assert set(layer["sensitivity"]) == {"mean", "p1", "images"}
        assert layer["low"] < layer["high"]
        assert layer["step"] > 0
        assert (layer["zero"] == 128) == (layer["input"] != "hidden")
        assert (layer["precision"], layer["reason"]) == ("int8", None)
    assert (report["missed"], report["float_layers"], report["float_macs"], report["integer_layers"]) == ([], [], 0, 12)
    assert report["fidelity"]["cosine_p1"] > report["bar"]["cosine_p1"] == 0.99
    shares = report["images"]
    digests = [digest for part in shares.values() for digest in part["sha256"]]
    assert len(digests) == len(set(digests)) == sum(part["count"] for part in shares.values()) == 24
    assert all(part["count"] > 0 for part in shares.values())
    manifest = Bundle.read(world.out).manifest
    assert manifest.precision == "int8"
    assert manifest.quantisation["images"] == {k: {n: v[n] for n in ("count", "digest")} for k, v in shares.items()}
    assert manifest.source["fp32_graph_sha256"] == Bundle.read(world.bundle).manifest.files["model.onnx"]
    assert manifest.sizes == Bundle.read(world.bundle).manifest.sizes
    carried = {p.key: p.value for p in onnx.load(world.out / "model.onnx").metadata_props}
    assert json.loads(carried["phreg.quantisation"]) == manifest.quantisation
    assert "INT8 against FP32 on" in outcome.err
    for name in ("model.onnx", "reference.npz"):  # ``int8_bundle`` was made of the same bundle and images
        assert (world.out / name).read_bytes() == (world.int8_bundle / name).read_bytes()
    assert {**stored, "seconds": 0} == {
        **json.loads((world.int8_bundle / "calibration.json").read_text()),
        "seconds": 0,
    }
    assert leftovers(world.tmp) == []


def test_an_eight_bit_bundle_serves_the_features_of_float(world, run_cli):
    image = world.photos / "frame-05.jpg"
    answers = []
    for folder in (world.bundle, world.int8_bundle):
        with FeatureExtractor.load(folder, backend="onnxruntime-cpu") as extractor:
            answers.append(extractor(image))
    parity = compare_runs(*({"features": d.features, "token_norm": d.token_norm, "cls": d.cls} for d in answers[::-1]))
    assert 0.99 < parity.cosine_p1 < 1
    assert run_cli("check", world.int8_bundle, "--json").document["missed"] == []
    assert run_cli("inspect", world.int8_bundle, "--json").document["quantisation"]["missed"] == []
    against = ["--reference", world.student, "--images", world.photos, "--limit", "4", "--json"]
    report = run_cli("check", world.int8_bundle, *against).document
    assert (report["missed"], report["precision"]) == ([], "int8")
    assert [c["with"] for c in report["comparisons"]] == ["own exam", f"PyTorch {world.student}"]


def test_a_range_of_sizes_and_batches_is_kept(wide_bundle, wide_int8_bundle):
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 96, 3), dtype=np.uint8)
    loaded = [FeatureExtractor.load(folder, backend="onnxruntime-cpu") for folder in (wide_int8_bundle, wide_bundle)]
    int8, full = (extractor.run(images) for extractor in loaded)
    assert int8["features"].shape == (3, 6, 12, 48)
    assert compare_runs(int8, full).cosine_p1 > 0.98
    cases = run_exam(loaded[0].bundle, loaded[0].run)
    assert len(cases) == 3
    assert all(missed_gates(case.parity, "int8", exam=True) == [] for case in cases)
    assert (wide_int8_bundle / "pos_embed.npy").read_bytes() == (wide_bundle / "pos_embed.npy").read_bytes()


def test_a_missed_bar_writes_nothing(world, run_cli, quick):
    outcome = run_cli(*command(world, "--cosine", "0.99999", "--float-macs", "0"))
    outcome.refused(
        3, "1st-percentile patch cosine 0.99", "expected at least 0.99999", "Nothing was written", "--float-macs"
    )
    report = outcome.document
    assert len(outcome.out.splitlines()) == 1, "figures and error in one document"
    assert report["fidelity"]["cosine_p1"] < report["bar"]["cosine_p1"] == 0.99999
    assert len(report["missed"]) == 1
    assert len(report["layers"]) == 12
    assert list(world.tmp.iterdir()) == []


def test_force_writes_it_and_it_is_marked_in_its_manifest(world, run_cli, quick):
    outcome = run_cli(*command(world, "--cosine", "0.99999", "--float-macs", "0.12", "--force"))
    assert outcome.code == 0, outcome.err
    report = outcome.document
    layers = report["float_layers"]
    assert layers
    assert report["float_macs"] <= 0.12
    assert report["integer_layers"] == 12 - len(layers)
    assert [step["layer"] for step in report["fallback"]] == [None, *layers]
    for layer in report["layers"]:
        assert (layer["precision"] == "float") == (layer["name"] in layers) == bool(layer["reason"])
    assert report["missed"]
    assert "Missed: 1st-percentile patch cosine" in outcome.err
    manifest = run_cli("inspect", world.out, "--json").document
    assert manifest["quantisation"]["missed"] == report["missed"]
    assert [f"{name} (sensitive)" for name in layers] == manifest["float_parts"][-len(layers) :]
    assert run_cli("check", world.out, "--backend", "onnxruntime-cpu", "--json").document["missed"] == []


def test_the_target_trt_has_no_zero_points(world, run_cli, quick):
    outcome = run_cli(*command(world, "--target", "trt"))
    assert outcome.code == 0, outcome.err
    model = onnx.load(world.out / "model.onnx")
    zeros = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    values = {numpy_helper.to_array(i).item() for i in model.graph.initializer if i.name in zeros}
    types = {i.data_type for i in model.graph.initializer if i.name in zeros}
    assert (values, types) == ({0}, {onnx.TensorProto.INT8})
    assert Bundle.read(world.out).manifest.quantisation["target"] == "trt"


MISTAKES = {
    "a bundle of 16 bits": (lambda w: command(w, bundle=rewrite_bundle(w.copy("bundle"), precision="fp16")),
        ["got a bundle in fp16, expected fp32"]),
    "a bundle of 8 bits": (lambda w: command(w, bundle=w.int8_bundle), ["got a bundle in int8, expected fp32"]),
    "a student": (lambda w: command(w, bundle=w.student),
        ["no manifest.json", "run `phreg-deploy export` on it first"]),
    "no bundle": (lambda w: command(w, bundle=w.tmp / "none"), ["there is nothing"]),
    "a graph that was changed": (lambda w: command(w, bundle=w.copy("bundle", model=lambda b: b[:-1] + b"?")),
        ["model.onnx", "another sha256"]),
    "NaN in the weights": (lambda w: command(w, bundle=damaged(w, write_nan("blocks.1.mlp.fc1.weight"))),
        ["input of blocks.1.mlp.fc2 is not finite", "damaged"]),
    "a graph of an older version": (lambda w: command(w, bundle=damaged(w, remove_names)),
        ["names no blocks", "Export it again"]),
    "no images": (lambda w: command(w, "--images", w.tmp / "none"), ["images", "there is nothing"]),
    "a folder without images": (lambda w: command(w, "--images", w.bundle), ["holds no image"]),
    "too few images": (lambda w: command(w, "--images", make_images(w, 7)), ["holds 7 different images", "at least 8"]),
    "one image many times": (lambda w: command(w, "--images", make_images(w, 12)),
        ["holds 1 different images", "at least 8"]),
    "a mode of the future": (lambda w: command(w, "--mode", "fp4"), ["mode: got 'fp4', expected int8 or fp8"]),
    "fp8 for the processor": (lambda w: command(w, "--mode", "fp8", "--target", "cpu"),
        ["no processor computes in FP8"]),
    "fp32 to keep on the processor": (lambda w: command(w, "--keep-fp32", "norm"),
        ["everything around the 8 bits is FP32 already"]),
    "an unknown mode": (lambda w: command(w, "--mode", "int4"), ["mode: got 'int4', expected int8"]),
    "an unknown target": (lambda w: command(w, "--target", "npu"), ["target: got 'npu', expected cpu or trt"]),
    "a negative share": (lambda w: command(w, "--float-macs", "-0.1"), ["float MACs: got -0.1", "share from 0 to 1"]),
    "a share above all": (lambda w: command(w, "--float-macs", "1.5"), ["float MACs: got 1.5"]),
    "a share that is no number": (lambda w: command(w, "--float-macs", "nan"), ["float MACs: got nan"]),
    "a share in words": (lambda w: command(w, "--float-macs", "some"), ["'some' is not a valid float"]),
    "no bar": (lambda w: command(w, "--cosine", "0"), ["cosine: got 0.0", "above 0 and up to 1"]),
    "a bar too high": (lambda w: command(w, "--cosine", "1.01"), ["cosine: got 1.01"]),
    "output nowhere": (lambda w: command(w, output=w.tmp / "no" / "out"), ["no folder", "create it first"]),
    "output is the input": (lambda w: command(w, "--force", output=w.bundle), ["read here", "choose another name"]),
    "export without images": (lambda w: export(w, "--precision", "int8"), ["--precision int8 needs --images DIR"]),
    "export with images for nothing": (lambda w: export(w, "--images", w.photos),
        ["with --precision fp32 everything does"]),
    "export with few images": (lambda w: export_int8(w, "--images", make_images(w, 3)), ["holds 3 different images"]),
    "export of an unknown target": (lambda w: export_int8(w, "--target", "npu"), ["target: got 'npu'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_exit_code_2_and_writes_nothing(world, run_cli, name):
    make, fragments = MISTAKES[name]
    arguments = make(world)
    before = {p.name for p in world.tmp.iterdir()}
    run_cli(*arguments).refused(2, *fragments)
    assert {p.name for p in world.tmp.iterdir()} == before
    Bundle.read(world.bundle).verify()


def test_nan_behind_the_last_layer_is_bad_input(world, run_cli):
    run_cli(*command(world, bundle=damaged(world, write_nan("blocks.2.mlp.fc2.weight")))).refused(2, "not finite")


def test_an_output_that_exists_needs_force(world, run_cli, quick):
    world.out.mkdir()
    (world.out / "manifest.json").write_text("{}")
    run_cli(*command(world)).refused(2, "exists already; add --force")
    assert (world.out / "manifest.json").read_text() == "{}"
    assert run_cli(*command(world, "--force")).code == 0
    Bundle.read(world.out).verify()
    (world.tmp / "mine").mkdir()
    (world.tmp / "mine" / "thesis.txt").write_text("x")
    run_cli(*command(world, "--force", output=world.tmp / "mine")).refused(2, "files that phreg-deploy did not write")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(world, run_cli, monkeypatch, quick, error):
    def broken(*_arguments):
        raise error

    arguments = command(world)
    monkeypatch.setattr(calibrator, "write_npz", broken)
    outcome = run_cli(*arguments)
    assert outcome.code == (130 if error is KeyboardInterrupt else 2)
    assert ("Interrupted" if error is KeyboardInterrupt else "the disk is full") in outcome.err
    assert list(world.tmp.iterdir()) == []


def test_export_in_eight_bits_is_export_and_calibrate(world, run_cli):
    outcome = run_cli(*export_int8(world))
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["manifest"]["precision"] == "int8"
    assert document["calibration"]["missed"] == document["check"]["missed"] == []
    for name in ("model.onnx", "reference.npz"):
        assert (world.out / name).read_bytes() == (world.int8_bundle / name).read_bytes()
    assert [p.name for p in world.tmp.iterdir()] == ["out"], "the intermediate FP32 bundle is removed"


def test_unreadable_images_are_skipped_and_reported(world, run_cli, quick):
    folder = world.tmp / "mixed"
    shutil.copytree(world.photos, folder)
    (folder / "broken.jpg").write_bytes(b"")
    outcome = run_cli("calibrate", world.bundle, "--images", folder, "-o", world.out, "--json")
    assert outcome.code == 0
    assert "Skipped 1 unreadable file" in outcome.err
    assert sum(part["count"] for part in outcome.document["images"].values()) == 24
