"""The command line on a real model, from a timm ViT to features: what it prints, where, and its exit codes."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
from PIL import Image

from phreg_deploy import __main__ as program
from phreg_deploy import __version__
from phreg_deploy.cli import main
from phreg_deploy.cli.commands import VERBS
from tests.cli_helpers import ROOT, leftovers, run_python

pytestmark = pytest.mark.usefixtures("torch")
# Where figures are compared exactly: "auto" may choose another backend.
ONNXRUNTIME = ["--backend", "onnxruntime-cpu"]
QUICK = ["--epochs", "1", "--batch", "8", "--views", "6", "--device", "cpu", "--precision", "fp32"]


def document_of(outcome):
    """Assert that a command succeeded with one line on stdout and no traceback, and return its JSON document."""
    assert outcome.code == 0, outcome.err[-800:]
    assert len(outcome.out.splitlines()) == 1
    assert "Traceback" not in outcome.err
    return outcome.document


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_with_an_example(run_cli, command):
    for flag in ("--help", "-h"):
        outcome = run_cli(command, flag)
        assert outcome.code == 0
        assert "Example" in outcome.out
        assert f"phreg-deploy {command} " in outcome.out or f"phreg-deploy {command}\n" in outcome.out
        for option in ("--json", "--quiet"):
            assert option in outcome.out
        assert "None]" not in outcome.out
        assert outcome.err == ""


def test_the_help_names_the_chain_and_the_exit_codes(run_cli):
    outcome = run_cli("--help")
    assert outcome.code == 0
    lines = outcome.out[outcome.out.index("\nCommands:") :].splitlines()
    assert [line.split()[0] for line in lines if line[:3].strip() and line.startswith("  ")] == list(VERBS)
    assert "..." not in " ".join(lines)
    assert "Exit codes: 0 done; 2 usage or bad input; 3 a gate failed; 4" in " ".join(outcome.out.split())
    assert __version__ in run_cli("--version").out
    bare = run_cli()
    assert "Usage: phreg-deploy" in bare.out + bare.err


def test_help_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['phreg-deploy', '--help']\n"
        "from phreg_deploy.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print('code', stop.code)\n"
        "print('heavy', sorted({'torch', 'timm', 'onnx', 'onnxruntime', 'safetensors'} & set(sys.modules)))"
    )
    output = run_python(code)
    assert "Usage: phreg-deploy" in output
    assert output.splitlines()[-2:] == ["code 0", "heavy []"]


@pytest.mark.usefixtures("torch")
def test_every_recipe_is_in_the_help_and_the_readme(run_cli):
    from phreg_deploy.distill.recipes import RECIPES

    help_text, readme = " ".join(run_cli("distill", "--help").out.split()), (ROOT / "README.md").read_text()
    for name in RECIPES:
        assert f"{name} (" in help_text
        assert f"`--recipe {name}`" in readme


def test_python_m_and_the_script_run_the_same_command_line():
    process = subprocess.run(
        [sys.executable, "-m", "phreg_deploy", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Usage: python -m phreg_deploy" in process.stdout
    assert process.stderr == ""
    (script,) = entry_points(group="console_scripts", name="phreg-deploy")
    assert script.load() is program.main


def test_the_commands_run_one_after_another(world, run_cli):
    """distill -> inspect -> export -> check -> profile, each on the output of the one before."""
    student, bundle = world.tmp / "student", world.tmp / "bundle"
    record = document_of(run_cli("distill", world.base, "--images", world.photos, "-o", student, *QUICK, "--json"))
    assert record["output"] == str(student)
    assert record["images"] == {**record["images"], "trained": 21, "skipped": 0}
    # The place of the planted neuron has a longer position embedding, to which two units of block 0 add a little.
    strongest = max(record["register_neurons"], key=lambda n: n["share"])
    assert (strongest["block"], strongest["unit"]) == (1, 17)
    assert strongest["share"] > 0.8, record["register_neurons"]
    assert all(n["share"] < 0.05 for n in record["register_neurons"] if n is not strongest)
    assert record["scores"]["student"]["norm_outliers"]["rate"] < record["scores"]["base"]["norm_outliers"]["rate"]
    assert len(record["history"]["loss"]) == 1
    inspected = document_of(run_cli("inspect", student, "--json"))
    assert inspected["kind"] == "student"
    assert inspected["config"]["model_args"]["reg_tokens"] == 4
    assert inspected["record"]["seed"] == record["seed"] == 0

    written = document_of(run_cli("export", student, "-o", bundle, "--image-size", "64", "--json"))
    assert written["check"]["missed"] == []
    assert written["check"]["parity"]["cosine_p1"] > 0.99999
    assert {p.name for p in bundle.iterdir()} == {"manifest.json", "model.onnx", "reference.npz", "README.md"}
    assert document_of(run_cli("inspect", bundle, "--json")) == {
        "kind": "bundle",
        **json.loads((bundle / "manifest.json").read_text()),
    }

    page = world.tmp / "report.html"
    options = ["--reference", student, "--base", world.base, "--images", world.photos, "--limit", "5", "--report", page]
    report = document_of(run_cli("check", bundle, *options, "--json"))
    assert report["missed"] == []
    assert [c["with"] for c in report["comparisons"]] == ["own exam", f"PyTorch {student}"]
    assert set(report["artifacts"]) == {"base", "student", "bundle"}
    assert report["artifacts"]["bundle"]["norm_outliers"]["rate"] == 0
    assert report["artifacts"]["base"]["norm_outliers"]["rate"] == pytest.approx(4 / 64)
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 5
    assert "All gates passed" in html

    speed = document_of(run_cli("profile", bundle, "--seconds", "0.2", "--threads", "1", *ONNXRUNTIME, "--json"))
    assert speed["results"][0]["extractor"]["rounds"] >= 10
    assert speed["conditions"]["backend"] == "onnxruntime-cpu"
    assert speed["slower"] == []
    assert leftovers(world.tmp) == []


def test_a_student_loads_in_stock_timm(student):
    import timm

    model = timm.create_model(f"local-dir:{student}", pretrained=True)
    assert (model.num_reg_tokens, model.no_embed_class, model.num_classes) == (4, True, 5)


def test_artifacts_of_model_student_and_bundle_agree(world, run_cli):
    reports = {}
    for name in ("base", "student", "bundle"):
        picture = world.tmp / f"{name}.png"
        options = ["--images", world.photos, "--limit", "4", "--picture", picture, "--json"]
        reports[name] = document_of(run_cli("artifacts", getattr(world, name), *options))
        assert reports[name]["images"] == 4
        with Image.open(picture) as sheet:
            assert sheet.size == (816, 300)
    assert reports["base"]["norm_outliers"]["rate"] == pytest.approx(4 / 64)
    assert reports["base"]["norm_outliers"]["largest"] > 5
    assert reports["student"]["norm_outliers"]["rate"] == 0
    assert reports["bundle"]["norm_outliers"] == pytest.approx(reports["student"]["norm_outliers"], rel=1e-4)
    assert reports["bundle"]["shift_incoherence"] == pytest.approx(reports["student"]["shift_incoherence"], abs=2e-3)
    assert len(reports["base"]["blocks"]) == 3


def test_artifacts_of_a_timm_name_with_a_checkpoint(world, run_cli):
    options = ["--checkpoint", world.checkpoint, "--images", world.photos, "--limit", "1", "--json"]
    assert document_of(run_cli("artifacts", "vit_tiny_patch16_224", *options))["images"] == 1


def test_unreadable_files_are_skipped_and_counted(world, run_cli):
    outcome = run_cli("artifacts", world.bundle, "--images", world.odd_images, "--json")
    assert document_of(outcome)["images"] == 6
    assert "Skipped 3 unreadable files" in outcome.err
    assert "empty.png" in outcome.err


@pytest.mark.parametrize(
    ("command", "title"),
    [
        (lambda w: ["inspect", w.bundle], "Bundle "),
        (lambda w: ["inspect", w.student], "Student "),
        (lambda w: ["inspect", w.base], "timm model "),
        (lambda w: ["check", w.bundle, "--images", w.photos, "--limit", "2"], "Parity of "),
        (lambda w: ["profile", w.bundle, "--seconds", "0.1"], "Milliseconds on "),
        (lambda w: ["extract", w.bundle, w.photos / "frame-00.png", "-o", w.out], "Features in "),
        (lambda w: ["artifacts", w.student, "--images", w.photos, "--limit", "2"], "Artifacts of "),
        (
            lambda w: ["distill", w.base, "--images", w.photos, "-o", w.out, *QUICK, "--epochs", "0"],
            "Base and student on ",
        ),
    ],
)
def test_tables_go_to_stdout_or_with_json_to_stderr_or_with_quiet_nowhere(world, run_cli, command, title):
    plain = run_cli(*command(world))
    assert plain.code == 0, plain.err
    assert title in plain.out
    force = ["--force"] if world.out.exists() else []
    aside = run_cli(*command(world), *force, "--json")
    assert title in aside.err
    assert isinstance(document_of(aside), dict)
    silent = run_cli(*command(world), *force, "--quiet")
    assert (silent.code, silent.out, silent.err) == (0, "", "")
    assert isinstance(document_of(run_cli(*command(world), *force, "--quiet", "--json")), dict)


def test_doctor_reports_what_this_machine_can_run(run_cli):
    outcome = run_cli("doctor", "--json")
    findings = {f["part"]: f for f in document_of(outcome)["findings"]}
    assert {"python", "torch + timm", "onnx", "onnxruntime", "NVIDIA driver"} <= set(findings)
    for part in ("python", "torch + timm", "onnx", "onnxruntime"):
        assert findings[part]["usable"], findings[part]
        assert findings[part]["mend"] is None
    assert "What this machine can run" in outcome.err


def test_an_interruption_is_exit_code_130_and_leaves_nothing(world, run_cli, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    options = ["extract", world.bundle, world.photos, "-o", world.out, "--json"]
    monkeypatch.setattr(np, "save", interrupted)
    outcome = run_cli(*options)
    assert outcome.code == 130
    assert "Interrupted" in outcome.err
    assert list(world.tmp.iterdir()) == []
