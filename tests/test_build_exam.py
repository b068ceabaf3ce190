"""`phreg-deploy build` examines each engine: its answers, its fused attention and its 8-bit layers."""

import json

import pytest

from phreg_deploy.errors import BackendMissing
from tests.build_helpers import build, plan_files
from tests.cli_helpers import invoke, leftovers
from tests.test_inspector_dumps import DUMPS

pytestmark = pytest.mark.usefixtures("all_freed")

# Real layers of other networks.
REAL = json.dumps({"Layers": [layer for dump in DUMPS.values() for layer in dump["layers"]], "Bindings": []})
REGION = json.dumps({"Layers": ["{ForeignNode[blocks.0.norm1...blocks.2.mlp]}"]})


def test_unfused_attention_is_kept_and_said(copy_bundle, tensorrt):
    folder, tensorrt.unfused_blocks = copy_bundle("fp16_bundle"), {1}
    done = build(folder)
    assert done.code == 0
    assert done.document["short"] == ["2 of 3 attentions are fused"]
    assert done.document["census"]["fused_attention"] == ["blocks.0.attn", "blocks.2.attn"]
    assert done.document["census"]["unfused_attention"] == ["blocks.1.attn"]
    assert len(plan_files(folder)) == 2
    assert "Missed: 2 of 3 attentions are fused." in invoke("build", folder).out


def test_unfused_attention_is_refused_if_asked(copy_bundle, tensorrt):
    folder, tensorrt.unfused_blocks = copy_bundle("fp16_bundle"), {1}
    done = build(folder, "--strict")
    done.refused(3, "2 of 3 attentions are fused", "Leave out --strict")
    (finding,) = done.document["findings"]
    assert finding["verdict"] == "no"
    assert plan_files(folder) == []
    assert build(folder, "--allow-unfused").code == 0
    build(folder, "--strict").refused(3, "2 of 3 attentions are fused")
    assert len(plan_files(folder)) == 2, "an engine that was there already stays"


@pytest.mark.parametrize("text", ["no JSON", REGION, REAL], ids=["no JSON", "one region", "real layers"])
def test_an_engine_that_the_inspector_does_not_show_is_kept_in_doubt(copy_bundle, tensorrt, text):
    folder, tensorrt.inspected = copy_bundle("int8_trt_bundle"), text
    done = build(folder)
    assert done.code == 0
    assert done.document["short"] == []
    attention, linear = done.document["doubts"]
    assert attention.startswith("0 of 3 attentions are fused, and TensorRT's inspector does not show")
    assert "does not show the types of 12 of 12 8-bit linear layers" in linear
    assert "Cannot tell: 0 of 3 attentions" in invoke("build", folder).out
    (kept,) = (folder / "engines").glob("*.inspector.json")
    assert kept.read_text() == text
    build(folder, "--force", "--strict").refused(3, "inspector does not show")


def test_the_inspectors_text_lies_beside_the_plan_of_each_profile(copy_bundle, tensorrt):
    folder = copy_bundle("wide_bundle")
    build(folder)
    (text,) = (folder / "engines").glob("*.inspector.json")
    (plan,) = (folder / "engines").glob("*.plan")
    assert text.name == plan.stem + ".inspector.json"
    names = [layer["Name"] for layer in json.loads(text.read_text())["Layers"]]
    assert sum(name.endswith(" [profile 1]") for name in names) == len(names) / 2


def test_eight_bit_layers_are_counted(copy_bundle, tensorrt):
    folder = copy_bundle("int8_trt_bundle")
    done = build(folder)
    assert done.code == 0, done.err
    layers = json.loads((folder / "calibration.json").read_text())["layers"]
    expected = {layer["name"] for layer in layers if layer["precision"] != "float"}
    assert expected <= set(done.document["census"]["eight_bit"])
    assert len(done.document["census"]["fused_attention"]) == 3


def test_an_engine_that_lacks_eight_bit_layers_is_refused_if_asked(copy_bundle, tensorrt):
    folder, tensorrt.float_layers = copy_bundle("int8_trt_bundle"), {"blocks.1.mlp.fc2"}
    sentence = "1 of 12 linear layers that were meant to run in 8 bits run in float, e.g. blocks.1.mlp.fc2"
    build(folder, "--strict").refused(3, sentence)
    assert plan_files(folder) == []
    assert build(folder).document["short"] == [sentence]


@pytest.mark.parametrize("name", ["bundle", "wide_bundle"])
def test_an_engine_with_wrong_outputs_is_not_kept(copy_bundle, tensorrt, name):
    folder, tensorrt.zeroed_weights = copy_bundle(name), "blocks.1.mlp.fc1.weight"
    done = build(folder)
    done.refused(3, "parity:", "The engine was not kept", "--bisect")
    assert done.document["missed"]
    assert plan_files(folder) == []
    assert leftovers(folder) == []


def paths(runs):
    return {(run["profile"], run["batch"], tuple(run["size"]), run["path"]) for run in runs}


def test_every_profile_is_examined_on_every_path(copy_bundle, tensorrt):
    """``wide_bundle`` has batches 1:2:4, so the first profile serves single images and the second all others."""
    done = build(copy_bundle("wide_bundle"))
    assert done.code == 0, done.err
    runs = done.document["runs"]
    sizes = {tuple(run["size"]) for run in runs}
    every = ("plain", "captured", "replayed", "from the GPU")
    assert paths(runs) == {(p, b, size, path) for p, b in ((0, 1), (1, 2)) for size in sizes for path in every}
    assert all(run["passed"] and run["cosine_p1"] > 0.99999 for run in runs)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (lambda profile, _batch, _path: profile == 0, "first: profile 0, 1 image of 48x48, plain"),
        (lambda profile, _batch, _path: profile == 1, "first: profile 1, 2 images of 48x48, plain"),
        (lambda _profile, _batch, path: path == "replayed", "first: profile 0, 1 image of 48x48, captured"),
    ],
)
def test_one_wrong_profile_or_a_wrong_replay_is_found(copy_bundle, tensorrt, wrong, where):
    folder, tensorrt.wrong = copy_bundle("wide_bundle"), wrong
    done = build(folder)
    done.refused(3, "parity:", where)
    assert plan_files(folder) == []


def test_a_wrong_path_from_the_gpu_is_found(copy_bundle, tensorrt, monkeypatch):
    from phreg_deploy.runtime.trt.buffers import TensorBuffers

    fetch = TensorBuffers.fetch
    monkeypatch.setattr(TensorBuffers, "fetch", lambda self, name, source: fetch(self, name, source - 1))
    build(copy_bundle("bundle")).refused(3, "1 of 4 runs differ, first: profile 0, 1 image of 64x64, from the GPU")


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ((1, 8, 32), [(0, 1), (1, 2), (1, 8)]),
        ((1, 1, 4), [(0, 1), (0, 2)]),
        ((2, 4, 4), [(0, 2), (1, 3), (1, 4)]),
        ((1, 1, 1), [(0, 1)]),
    ],
)
def test_the_least_and_the_best_batch_of_each_profile_are_served_by_it(batches, expected):
    from phreg_deploy.bundle.profiles import ProfileShapes
    from phreg_deploy.export.engine.exam import served_batches

    low, best, _ = batches
    numbers = [(low,) * 3, batches] if low < best else [batches]
    profiles = [ProfileShapes({"image": [[batch, 64, 64, 3] for batch in triple]}) for triple in numbers]
    case = min(2, batches[2])
    assert served_batches(profiles, (case, 64, 64, 3)) == expected


def test_force_keeps_an_engine_with_wrong_outputs_and_reports_it(copy_bundle, tensorrt):
    folder, tensorrt.zeroed_weights = copy_bundle("bundle"), "blocks.1.mlp.fc1.weight"
    done = build(folder, "--force")
    assert done.code == 0
    assert done.document["missed"]
    assert len(plan_files(folder)) == 2
    assert "Missed: 1st-percentile patch cosine" in invoke("build", folder).out


def test_a_good_engine_stays_when_a_forced_one_is_refused(copy_bundle, tensorrt):
    folder = copy_bundle("fp16_bundle")
    build(folder)
    before = [(folder / "engines" / name).read_bytes() for name in plan_files(folder)]
    tensorrt.unfused_blocks = {0}
    build(folder, "--force", "--strict").refused(3, "attentions are fused")
    assert [(folder / "engines" / name).read_bytes() for name in plan_files(folder)] == before


def test_an_engine_without_exam_is_built_again_if_the_exam_is_wanted(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
    assert build(folder, "--no-check").document["cached"] is False
    assert build(folder, "--no-check").document["cached"] is True
    again = build(folder).document
    assert again["cached"] is False
    assert again["parity"]["cosine_p1"] > 0.99999
    assert build(folder).document["cached"] is True


def test_the_new_plan_is_examined_and_not_an_older_one(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
    assert build(folder, "--effort", "5").code == 0
    tensorrt.zeroed_weights = "blocks.1."
    build(folder, "--effort", "2").refused(3, "1st-percentile patch cosine")
    assert len([name for name in plan_files(folder) if name.endswith(".plan")]) == 1


def test_a_missing_onnx_does_not_hide_the_gate_that_bisect_explains(copy_bundle, tensorrt, monkeypatch):
    tensorrt.zeroed_weights = "blocks.1."
    monkeypatch.setattr(
        "phreg_deploy.verify.bisection.bisect",
        lambda *_, **__: (_ for _ in ()).throw(BackendMissing("needs the module 'onnx'")),
    )
    done = build(copy_bundle("bundle"), "--bisect")
    done.refused(3, "1st-percentile patch cosine")
    assert "needs the module 'onnx'" in done.document["bisection"]["skipped"]


def test_no_check_skips_the_exam(copy_bundle, tensorrt):
    folder, tensorrt.zeroed_weights = copy_bundle("bundle"), "blocks.1.mlp.fc1.weight"
    done = build(folder, "--no-check")
    assert done.code == 0
    assert "parity" not in done.document
    assert tensorrt.runs == 0


@pytest.mark.parametrize(
    ("weight", "place"), [("blocks.1.mlp.fc1.weight", "blocks.1.mlp"), ("blocks.2.attn.qkv.weight", "blocks.2.attn")]
)
@pytest.mark.parametrize("name", ["bundle", "fp16_bundle"])
def test_bisect_names_the_block_that_is_wrong(copy_bundle, tensorrt, name, weight, place):
    folder, tensorrt.zeroed_weights = copy_bundle(name), weight
    done = build(folder, "--bisect")
    done.refused(3, f"The first that diverges is {place}")
    bisection = done.document["bisection"]
    assert bisection["first"] == place
    assert len(bisection["steps"]) == 6
    assert plan_files(folder) == []
