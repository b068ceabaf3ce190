"""The latency gate: which files are a baseline, which conditions must agree, and which growth fails."""

import copy
import json

import pytest

from phreg_deploy.profiling import latency

HERE = ["--seconds", "0.1", "--threads", "1", "--backend", "onnxruntime-cpu", "--json"]


@pytest.fixture(scope="module")
def baseline_report(wide_bundle, run_cli):
    """Profile the bundle on this machine; return the report."""
    done = run_cli("profile", wide_bundle, "--batch", "1,2", *HERE)
    assert done.code == 0, done.err
    return done.document


@pytest.fixture
def gate(world, run_cli, baseline_report, tmp_path):
    """``gate(change, ...)`` profiles batch 1 against a copy of today's report that ``change`` has changed."""

    def run(change, *more):
        report = copy.deepcopy(baseline_report)
        change(report)
        (tmp_path / "then.json").write_text("a line of a terminal\n" + json.dumps(report))
        return run_cli("profile", world.wide_bundle, "--batch", "1", "--baseline", tmp_path / "then.json", *HERE, *more)

    return run


def scale_latency(factor):
    def change(report):
        for result in report["results"]:
            result["extractor"]["p50"] *= factor

    return change


def change_condition(name, value):
    def change(report):
        report["conditions"][name] = value

    return change


def test_growth_beyond_the_tolerance_is_exit_code_3(gate):
    outcome = gate(scale_latency(1e-4))
    outcome.refused(3, "batch 1 at 64x64", "the baseline's")
    assert len(outcome.document["slower"]) == 1
    assert gate(scale_latency(1e-4), "--tolerance", "1e9").code == 0
    passed = gate(scale_latency(1e4))
    assert (passed.code, passed.document["slower"]) == (0, [])
    assert passed.document["baseline"]["differences"] == []
    (row,) = passed.document["baseline"]["rows"]
    assert (row["batch"], row["ratio"] < 1) == (1, True)
    assert "Median milliseconds against" in passed.err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("processor", "Another Processor", "processor: Another Processor in the baseline"),
        ("cores", 999, "cores: 999"),
        ("gpu", "Some GPU", "gpu: Some GPU"),
        ("backend", "openvino", "backend: openvino in the baseline, onnxruntime-cpu now"),
        ("backend_version", "onnxruntime 0.1", "backend version: onnxruntime 0.1"),
        ("threads", None, "threads: the default in the baseline, 1 now"),
        ("mode", "throughput", "mode: throughput"),
        ("compute", "bf16", "compute: bf16 in the baseline, fp32 now"),
        ("precision", "int8", "precision: int8"),
        ("graph_sha256", "ab" * 32, "graph sha256: abababababababab…"),
    ],
)
def test_a_baseline_of_other_conditions_is_refused_before_measuring(gate, monkeypatch, name, value, said):
    with monkeypatch.context() as patch:
        patch.setattr(latency, "measure", lambda *_: pytest.fail("it measured before it refused"))
        outcome = gate(change_condition(name, value))
    outcome.refused(2, "measured under other conditions", said, "--allow-other-conditions")
    assert len(outcome.document["differences"]) == 1


def test_other_conditions_are_compared_when_asked_and_named_in_table_and_json(gate):
    def other(report):
        scale_latency(1e4)(report)
        report["conditions"].update(processor="Another Processor", threads=8)

    outcome = gate(other, "--allow-other-conditions")
    assert outcome.code == 0, outcome.err
    assert [line.split(":")[0] for line in outcome.document["baseline"]["differences"]] == ["processor", "threads"]
    assert "OTHER CONDITIONS" in outcome.err
    assert "Other condition: threads: 8 in the baseline, 1 now." in outcome.err


def test_a_condition_that_the_baseline_does_not_record_is_a_difference(gate):
    gate(lambda report: report["conditions"].pop("mode")).refused(2, "mode: not recorded in the baseline, latency now")


def test_batches_and_sizes_are_compared(gate):
    gate(lambda report: report["results"].pop(0)).refused(
        2, "no batch and size in common", "batch 1 at 64x64", "batch 2 at 64x64"
    )
    lacking = gate(lambda report: report["results"].pop(1), "--batch", "1,2")
    lacking.refused(2, "batch 2 at 64x64: not in the baseline")


@pytest.mark.parametrize("value", ["-0.9", "nan", "inf", "much"])
def test_a_tolerance_out_of_range_is_refused(world, run_cli, value):
    run_cli("profile", world.bundle, "--tolerance", value, "--json").refused(2, "--tolerance", value)


def test_every_batch_is_checked_before_one_is_measured(world, run_cli, monkeypatch):
    bundle = world.wide_bundle
    monkeypatch.setattr(latency, "measure", lambda *_: pytest.fail("it measured before it refused"))
    run_cli("profile", bundle, "--batch", "1,4,20", "--json").refused(2, "got 20 images", "1 to 4")


OTHERS = {  # id: (file, what the message says)
    "empty": (b" \n", "is empty"),
    "words": (b"5 ms", "is not JSON;"),
    "binary": (b"\xff\xfe\x80", "is not JSON but a binary file"),
    "a list": (b"[1]", "but a JSON list"),
    "an empty object": (b"{}", "but an empty JSON object"),
    "other keys": (b'{"alpha": 1}', "keys 'alpha'"),
    "an error": (b'{"error": "x", "exit_code": 2}', "the error of a command that failed"),
    "a word for a number": (
        b'{"results": [{"batch": 1, "size": [64, 64], "extractor": {"p50": "fast"}}]}',
        "not a report of latencies",
    ),
    "a median of NaN": (b'{"results": [{"batch": 1, "size": [64, 64], "extractor": {"p50": NaN}}]}', "not a report"),
    "no results": (b'{"results": []}', "not a report"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_baseline_is_described(world, run_cli, name):
    data, said = OTHERS[name]
    (world.tmp / "b.json").write_bytes(data)
    outcome = run_cli("profile", world.bundle, "--baseline", world.tmp / "b.json", "--json")
    outcome.refused(2, "b.json", said, "`phreg-deploy profile --json`")


def test_documents_of_other_commands_are_named(world, run_cli):
    """Real files, as the commands write them: indented JSON is JSON too."""
    index = world.out / "features.json"
    assert run_cli("extract", world.bundle, world.photos / "frame-00.png", "-o", world.out).code == 0
    for path, said in (
        (index, "an index of `phreg-deploy extract`"),
        (world.bundle / "manifest.json", "a bundle's manifest"),
        (world.student / "phreg.json", "a student's record"),
        (world.int8_bundle / "calibration.json", "a report of `phreg-deploy calibrate`"),
    ):
        run_cli("profile", world.bundle, "--baseline", path, "--json").refused(2, str(path), said)
