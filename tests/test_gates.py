"""Gates on parity, artifact rates and latency: exit code 3, and one JSON document with the figures and the error."""

import importlib
import sys

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.gates import GATES

pytestmark = pytest.mark.usefixtures("torch", "traced_once")


def test_a_missed_parity_gate_is_exit_code_3(world, run_cli, monkeypatch):
    page, bundle = world.tmp / "report.html", world.bundle
    gates = importlib.import_module("phreg_deploy.runtime.parity").GATES
    monkeypatch.setitem(gates, "fp32", {"cosine_p1": 1.1, "outlier_points": 0.0})
    outcome = run_cli("check", bundle, "--report", page, "--json")
    outcome.refused(3, str(world.bundle), "1st-percentile patch cosine", "expected at least 1.1")
    assert len(outcome.out.splitlines()) == 1, "one JSON document, with the figures and the error"
    assert outcome.document["missed"] == [outcome.document["error"].split(": ", 2)[2].rstrip(".")]
    assert "1 gate missed</strong>" in page.read_text()


@pytest.mark.parametrize("bar", ["1.5", "0", "-1", "nan"])
def test_a_cosine_out_of_range_is_refused(world, run_cli, bar):
    for command in (["check", world.bundle], ["calibrate", world.bundle, "--images", world.photos, "-o", world.out]):
        run_cli(*command, "--cosine", bar, "--json").refused(2, "cosine", bar)
    assert not world.out.exists()


def test_a_bundle_that_misses_its_gate_at_export_is_exit_code_3(world, run_cli, monkeypatch):
    parity = importlib.import_module("phreg_deploy.runtime.parity")
    asked = ["export", world.student, "-o", world.out, "--json"]
    monkeypatch.setitem(parity.GATES, "fp32", {"cosine_p1": 1.1, "outlier_points": 0.0})
    outcome = run_cli(*asked)
    outcome.refused(3, "parity", "expected at least 1.1")
    assert len(outcome.out.splitlines()) == 1
    assert outcome.document["check"]["missed"]


def test_an_outlier_rate_above_its_gate_is_exit_code_3(world, run_cli):
    outcome = run_cli("check", world.bundle, "--outlier-points", "-1", "--json")
    outcome.refused(3, "norm-outlier rate changed by 0.0000 points", "expected at most -1")


def test_a_users_gate_replaces_the_precisions(world, run_cli, monkeypatch):
    monkeypatch.setitem(
        importlib.import_module("phreg_deploy.runtime.parity").GATES, "fp32", {"cosine_p1": 1.1, "outlier_points": 0.0}
    )
    assert run_cli("check", world.bundle).code == 3
    assert run_cli("check", world.bundle, "--cosine", "0.9").code == 0


def test_gates_hold_on_a_chosen_backend(world, run_cli, monkeypatch):
    gates = importlib.import_module("phreg_deploy.runtime.parity").GATES
    monkeypatch.setitem(gates, "fp32", {"cosine_p1": 1.1, "outlier_points": 0.0})
    asked = ["check", world.bundle, "--backend", "onnxruntime-cpu", "--json"]
    run_cli(*asked).refused(3, "expected at least 1.1")
    assert run_cli(*asked, "--cosine", "0.9").code == 0


def test_a_bundle_of_another_model_misses_its_gates(world, run_cli):
    """The student's bundle against the base model, whose features it must not reproduce."""
    outcome = run_cli(
        "check", world.bundle, "--reference", world.base, "--images", world.photos, "--limit", "3", "--json"
    )
    outcome.refused(3, "1st-percentile patch cosine")


def test_values_that_are_not_numbers_miss_every_gate():
    from phreg_deploy.runtime.parity import compare_runs, gates_of, missed_gates

    rng = np.random.default_rng(0)
    run = {"features": rng.normal(size=(1, 4, 4, 8)), "token_norm": np.ones((1, 4, 4))}
    assert missed_gates(compare_runs(run, run), "fp32") == []
    bad = {**run, "features": run["features"].copy()}
    bad["features"][0, 1, 1, 3] = np.nan
    parity = compare_runs(bad, run)
    assert parity.bad_values == 1
    assert missed_gates(parity, "int8")[0].split(",")[0] == "1 NaN or infinite values"
    gates = gates_of(parity, "int8")
    assert len(gates) == len(GATES["int8"]) - 1, (
        "all but those on the class token and heads, which this run has none of"
    )
    assert not any(gate.passed for gate in gates)


def test_a_bundle_that_no_backend_can_run_is_written_and_reported_as_unchecked(world, run_cli, monkeypatch):
    """BF16 on a machine with neither OpenVINO nor a GPU."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("phreg_deploy.runtime.backends.registry.driver_present", lambda: False)
    done = run_cli("export", world.student, "-o", world.out, "--precision", "bf16", "--json")
    assert done.code == 0, done.err[-500:]
    assert "no bfloat16 on the processor" in done.document["check"]["skipped"]
    assert "Parity was not checked" in done.err
    Bundle.read(world.out).verify()
