"""A missing or broken extra is exit code 4 and the command that installs it, in a process without the extra."""

import sys

import pytest

from tests.cli_helpers import without

pytestmark = pytest.mark.usefixtures("torch", "traced_once")

HEAVY = ["torch", "timm", "safetensors", "onnx", "onnxscript", "torchvision"]
DISTILL, EXPORT = 'pip install "phreg-deploy[distill]"', 'pip install "phreg-deploy[export]"'


def torch_commands(w):
    """List commands that need PyTorch, by name."""
    return {
        "distill": ["distill", w.base, "--images", w.photos, "-o", w.out, "--json"],
        "export": ["export", w.student, "-o", w.out, "--json"],
        "artifacts": ["artifacts", w.base, "--images", w.photos, "--json"],
        "check": ["check", w.bundle, "--images", w.photos, "--reference", w.student, "--json"],
        "explore": ["explore", w.bundle, "--images", w.photos, "--base", w.base, "-o", w.out, "--json"],
    }


@pytest.mark.parametrize(
    ("module", "extras"),
    [
        ("torch", {"distill": DISTILL, "export": EXPORT, "artifacts": DISTILL, "check": DISTILL, "explore": DISTILL}),
        ("timm", {"distill": DISTILL, "export": EXPORT, "artifacts": DISTILL, "check": DISTILL}),
        ("safetensors", {"distill": DISTILL, "export": EXPORT, "artifacts": DISTILL, "check": DISTILL}),
        ("onnx", {"export": EXPORT}),
        ("onnxscript", {"export": EXPORT}),
    ],
)
def test_a_missing_module_is_named_with_the_extra_that_brings_it(world, module, extras):
    commands = torch_commands(world)
    outcomes = without([module], [commands[name] for name in extras])
    for (name, extra), outcome in zip(extras.items(), outcomes):
        outcome.refused(4, f"'{module}'", extra)
        assert not world.out.exists(), name


def test_all_that_is_missing_is_named_at_once_with_one_line(world):
    """The user can install everything at once, not one module after each error."""
    commands = torch_commands(world)
    commands["export in INT8"] = [*commands["export"], "--precision", "int8", "--images", world.photos]
    commands["calibrate"] = ["calibrate", world.bundle, "--images", world.photos, "-o", world.out, "--json"]
    commands["demo"] = ["demo", "-o", world.out, "--json"]
    distil = "'safetensors', 'timm', 'torch'"
    expected = {
        "distill": (distil, "[distill]"),
        "export": (f"'ml_dtypes', 'onnx', 'onnxscript', {distil}", "[export]"),
        "artifacts": (distil, "[distill]"),
        "check": (f"'onnxruntime', {distil}", "[distill,cpu]"),
        "explore": (f"'onnxruntime', {distil}", "[distill,cpu]"),
        "export in INT8": (f"'ml_dtypes', 'onnx', 'onnxruntime', 'onnxscript', {distil}", "[export,calibration]"),
        "calibrate": ("'ml_dtypes', 'onnx', 'onnxruntime'", "[calibration]"),
        "demo": (f"'ml_dtypes', 'onnx', 'onnxruntime', 'onnxscript', {distil}", "[export,calibration]"),
    }
    blocked = [*HEAVY, "ml_dtypes", *RUNTIMES, "tensorrt", "tensorrt_lean"]
    for name, outcome in zip(commands, without(blocked, commands.values())):
        modules, extras = expected[name]
        outcome.refused(4, f"needs the modules {modules}, which are", f'pip install "phreg-deploy{extras}"')


def test_commands_that_serve_need_no_torch(world):
    image = world.photos / "frame-02.png"
    outcomes = without(
        HEAVY,
        [
            ["inspect", world.bundle, "--json"],
            ["inspect", world.student, "--json"],
            [
                "check",
                world.bundle,
                "--images",
                world.photos,
                "--limit",
                "2",
                "--report",
                world.tmp / "r.html",
                "--json",
            ],
            ["extract", world.wide_bundle, image, "-o", world.out, "--json"],
            ["artifacts", world.bundle, "--images", world.photos, "--limit", "2", "--json"],
            ["profile", world.bundle, "--seconds", "0.1", "--json"],
        ],
    )
    assert [outcome.code for outcome in outcomes] == [0] * 6, [o.err[-300:] for o in outcomes if o.code]
    assert outcomes[0].document["kind"] == "bundle"
    assert outcomes[1].document["kind"] == "student"
    assert outcomes[2].document["missed"] == []
    assert (world.out / "frame-02.npy").is_file()


def test_a_torchvision_of_another_torch_is_recognised(world):
    broken = world.tmp / "broken" / "timm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    commands = torch_commands(world)
    for outcome in without([], list(commands.values()), path=[broken.parent]):
        outcome.refused(4, "torchvision", "another build of torch", "pip install --force-reinstall torch torchvision")


RUNTIMES = ("onnxruntime", "openvino")
SERVING = {
    "check": lambda w: ["check", w.bundle],
    "extract": lambda w: ["extract", w.bundle, w.photos, "-o", w.out],
    "profile": lambda w: ["profile", w.bundle, "--seconds", "0.1"],
    "artifacts": lambda w: ["artifacts", w.bundle, "--images", w.photos],
}


@pytest.mark.parametrize(("backend", "extra"), [("auto", "cpu"), ("onnxruntime-cpu", "cpu"), ("openvino", "openvino")])
@pytest.mark.parametrize("command", SERVING)
def test_serving_without_a_runtime_is_refused(world, run_cli, monkeypatch, command, backend, extra):
    words = SERVING[command](world)
    for runtime in RUNTIMES:
        monkeypatch.setitem(sys.modules, runtime, None)
    run_cli(*words, "--backend", backend, "--json").refused(4, f'pip install "phreg-deploy[{extra}]"')
    assert not world.out.exists()


def test_a_runtime_that_cannot_be_imported_is_reported(world):
    broken = world.tmp / "broken" / "onnxruntime"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise ImportError("libonnxruntime.so.1: cannot open shared object file")\n')
    commands = [[*SERVING[name](world), "--json"] for name in SERVING]
    for outcome in without([*HEAVY, "openvino"], commands, path=[broken.parent]):
        outcome.refused(4, "libonnxruntime.so.1", "pip install")


def broken_runtimes(world, *names):
    folder = world.tmp / "broken"
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            f'raise ImportError("lib{name}.so.1: cannot open shared object file")\n'
        )
    return folder


def test_one_runtime_serves_if_the_other_cannot_be_imported(world):
    pytest.importorskip("openvino")
    commands = [["check", world.bundle, "--json"]]
    (outcome,) = without(HEAVY, commands, path=[broken_runtimes(world, "onnxruntime")])
    assert outcome.code == 0, outcome.err
    assert outcome.document["backend"] == "openvino"
    assert "onnxruntime-cpu does not serve it (backend: onnxruntime cannot be imported" in outcome.document["choice"]


def test_it_is_an_error_if_no_runtime_can_be_imported(world):
    commands = [["check", world.bundle, "--json"]]
    (outcome,) = without(HEAVY, commands, path=[broken_runtimes(world, *RUNTIMES)])
    outcome.refused(4, "libonnxruntime.so.1", "libopenvino.so.1", "pip install")


def test_export_without_a_runtime_reports_that_nothing_was_checked(world, run_cli, monkeypatch):
    words = ["export", world.student, "-o", world.out]
    for runtime in RUNTIMES:
        monkeypatch.setitem(sys.modules, runtime, None)
    outcome = run_cli(*words, "--json")
    assert outcome.code == 0, outcome.err
    assert "phreg-deploy[cpu]" in outcome.document["check"]["skipped"]
    assert "Parity was not checked" in outcome.err
    assert (world.out / "model.onnx").is_file()
