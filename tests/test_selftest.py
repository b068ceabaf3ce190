"""`phreg-deploy selftest` on the processor, its refusals, and its archive."""

import json
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest

from phreg_deploy.progress import SILENT
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.selftest import selftest
from phreg_deploy.selftest.archive import anonymous
from phreg_deploy.selftest.checks import FAIL, PASS, SKIP, Failed, Sheet, Skipped, Verdict
from phreg_deploy.selftest.processor import check_exam
from phreg_deploy.selftest.serving import check_memory
from phreg_deploy.selftest.subjects import Subject
from tests.cli_helpers import invoke


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr("phreg_deploy.selftest.serving.ROUNDS", 4)
    monkeypatch.setattr("phreg_deploy.selftest.serving.WARM", 4)
    monkeypatch.setattr("phreg_deploy.selftest.runner.diagnose", lambda: [])


def failed(verdict):
    return {one.name.partition(", ")[2] for one in verdict.failed}


def test_a_bundle_passes_on_every_backend_of_the_processor(tmp_path, bundle, short):
    done = invoke("selftest", "--bundle", bundle, "--frames", "8", "-o", tmp_path / "a.zip", "--json")
    assert done.code == 0, done.err[-800:]
    assert done.document["passed"] is True
    verdicts = {one["name"]: one["verdict"] for one in done.document["checks"]}
    for name in ("exam", "two threads", "memory"):
        assert verdicts[f"bundle 1 fp32 on onnxruntime-cpu, {name}"] == PASS
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert json.loads(archive.read("verdict.json"))["sentence"] == done.document["sentence"]
        assert json.loads(archive.read("machine.json"))["backends"]["onnxruntime-cpu"].startswith("onnxruntime ")


def test_wrong_answers_and_lost_memory_of_a_process_are_found(tmp_path, bundle, monkeypatch, short):
    right, kept, wrong = FeatureExtractor.run, [], []

    def run(self, batch, **how):
        kept.append(bytearray(b"x" * (8 << 20)))
        return {name: value * (-1 if wrong else 1) for name, value in right(self, batch, **how).items()}

    monkeypatch.setattr(FeatureExtractor, "run", run)
    monkeypatch.setattr("phreg_deploy.selftest.runner.installed", lambda: ["onnxruntime-cpu"])
    assert failed(selftest(tmp_path / "a.zip", bundles=[bundle], frames=16)) == {"memory"}
    kept.clear()
    wrong.append(True)
    assert failed(selftest(tmp_path / "b.zip", bundles=[bundle], frames=4)) == {"exam"}


def test_memory_does_not_apply_where_the_system_does_not_give_it(bundle, monkeypatch, short):
    """As on macOS and Windows, which have no /proc."""
    monkeypatch.setattr("phreg_deploy.selftest.serving.STATM", Path("/there/is/no/such/file"))
    with pytest.raises(Skipped, match="no /there/is/no/such/file"):
        check_memory(partial(FeatureExtractor.load, bundle, "onnxruntime-cpu"), 1, SILENT)


def test_a_backend_that_refuses_a_bundle_does_not_apply(bundle):
    load = partial(FeatureExtractor.load, bundle, "onnxruntime-cuda")
    with pytest.raises(Skipped, match="onnxruntime"):
        check_exam(Subject("small", "fp32", bundle, str), load)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-o", "{tmp}/taken.zip"], 2, "exists already; add --force"),
        (["-o", "{tmp}/findings"], 2, "expected the name of a .zip"),
        (["-o", "{tmp}/folder.zip"], 2, "is a folder"),
        (["-o", "{tmp}/none/a.zip"], 2, "there is no folder"),
        (["--bundle", "{tmp}/none", "-o", "{tmp}/a.zip"], 2, "none"),
        (["--bundle", "{broken}", "-o", "{tmp}/a.zip"], 2, "model.onnx"),
        (["--gpu", "-o", "{tmp}/a.zip"], 4, "GPU: "),
        (["--gpu", "--bundle", "{bundle}", "-o", "{tmp}/a.zip"], 4, "TensorRT: it is not installed"),
    ],
)
def test_bad_input_and_missing_parts_are_refused_before_any_check(tmp_path, copy_bundle, bundle, words, code, said):
    (tmp_path / "taken.zip").write_bytes(b"")
    (tmp_path / "folder.zip").mkdir()
    broken = copy_bundle("bundle")
    (broken / "model.onnx").write_bytes(b"")
    places = {"tmp": tmp_path, "broken": broken, "bundle": bundle}
    done = invoke("selftest", *(word.format(**places) for word in words), "--json")
    done.refused(code, said)
    assert not (tmp_path / "a.zip").exists()


def test_without_torch_a_bundle_must_be_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    done = invoke("selftest", "-o", tmp_path / "a.zip", "--json")
    done.refused(4, "needs the module 'torch'", "--bundle student.bundle")


def test_a_gpu_that_is_not_there_is_refused(tensorrt, tmp_path, bundle):
    words = ["selftest", "--gpu", "--device", "3", "--bundle", bundle, "-o", tmp_path / "a.zip", "--json"]
    invoke(*words).refused(4, "got device 3, expected one of 0 to 0")


def test_whatever_a_check_raises_is_its_verdict():
    heard = []
    sheet = Sheet(heard.append)

    def raises(error):
        def call():
            raise error

        return call

    assert sheet.run("sound", lambda: "as it should be")
    for name, error in {
        "wrong": Failed("not so"),
        "none": Skipped("no such part"),
        "odd": ZeroDivisionError("x"),
    }.items():
        assert not sheet.run(name, raises(error))
    assert [one.verdict for one in heard] == [PASS, FAIL, SKIP, FAIL]
    assert str(heard[1]) == "FAIL  wrong: not so"
    assert heard[3].detail == "ZeroDivisionError: x"
    verdict = Verdict(tuple(sheet.checks), "a.zip")
    assert str(verdict) == "FAIL: 1 passed, 2 failed, 1 do not apply here"
    assert not Verdict((heard[2],), "a.zip").passed, "a machine on which nothing applies has not passed"
    with pytest.raises(KeyboardInterrupt):
        sheet.run("interrupted", raises(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot open /opt/jane/nets/model.onnx: no such file", "cannot open .../model.onnx: no such file"),
        ("C:\\Users\\jane\\a.plan is read", ".../a.plan is read"),
        ("[ONNX Layer: blocks.0.attn/MatMul]", "[ONNX Layer: blocks.0.attn/MatMul]"),
        ("12.5 images/s and 3/4", "12.5 images/s and 3/4"),
        ("see https://github.com/NVIDIA/TensorRT/issues/4832", "see https://github.com/NVIDIA/TensorRT/issues/4832"),
    ],
)
def test_folders_are_taken_out_of_texts_and_nothing_else(text, expected):
    assert anonymous(text) == expected
