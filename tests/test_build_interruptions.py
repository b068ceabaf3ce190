"""An interrupted, damaged or failed build leaves no engine that is served."""

import json
import signal
from pathlib import Path

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests.build_helpers import build, plan_files
from tests.cli_helpers import leftovers

pytestmark = pytest.mark.usefixtures("all_freed")


def test_a_damaged_plan_is_not_run(copy_bundle, tensorrt):
    folder = copy_bundle("bundle")
    plan = Path(build(folder).document["engine"])
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    build(folder).refused(2, "was changed or damaged, and is not run", f"phreg-deploy build {folder} --force")
    with pytest.raises(PhregError, match="is not run"):
        FeatureExtractor.load(folder, "tensorrt")
    assert build(folder, "--force").code == 0
    FeatureExtractor.load(folder, "tensorrt").close()


def test_an_engine_whose_exam_broke_off_does_not_count(copy_bundle, tensorrt):
    folder, tensorrt.fail_enqueue = copy_bundle("bundle"), 1
    build(folder).refused(2, "could not start the inference")
    assert plan_files(folder) == []
    assert build(folder).document["cached"] is False


def test_an_older_engine_stays_until_the_new_one_is_examined(copy_bundle, tensorrt, monkeypatch):
    import phreg_deploy.bundle.plans as module

    folder = copy_bundle("bundle")
    build(folder)
    before = {p: p.read_bytes() for p in (folder / "engines").iterdir()}
    tensorrt.fail_enqueue = 1
    build(folder, "--force").refused(2, "could not start the inference")
    assert {p: p.read_bytes() for p in (folder / "engines").iterdir()} == before
    real = module.draft_file

    def full(target, data):
        if target.suffix == ".json":
            raise PhregError("output: the disk is full")
        return real(target, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "draft_file", full)
        build(folder, "--force").refused(2, "the disk is full")
    assert {p: p.read_bytes() for p in (folder / "engines").iterdir()} == before
    FeatureExtractor.load(folder, "tensorrt").close()
    assert build(folder, "--force").document["cached"] is False


def test_an_engine_whose_exam_was_interrupted_does_not_count(copy_bundle, tensorrt, monkeypatch):
    from phreg_deploy.export.engine import exam

    def ctrl_c(*_arguments):
        raise KeyboardInterrupt

    folder = copy_bundle("bundle")
    with monkeypatch.context() as patch:
        patch.setattr(exam, "run_exam", ctrl_c)
        build(folder).refused(130, "Interrupted")
    assert plan_files(folder) == []
    assert leftovers(folder) == []
    assert build(folder).document["cached"] is False


@pytest.mark.parametrize(
    "damage",
    [
        {"report": {}},
        {"report": {"census": {}}},
        {"report": {"parity": 3}},
        {"profiles": []},
        {"profiles": [{"inputs": {"image": 3}}]},
    ],
)
def test_a_damaged_sidecar_is_built_again(copy_bundle, tensorrt, damage):
    folder = copy_bundle("bundle")
    sidecar = Path(build(folder).document["engine"]).with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | damage))
    again = build(folder)
    assert (again.code, again.document["cached"]) == (0, False), again.err[-300:]


@pytest.mark.parametrize("at", [0, 3])
def test_an_interrupted_build_leaves_nothing(copy_bundle, tensorrt, at):
    folder, steps = copy_bundle("bundle"), []

    def ctrl_c(step):
        steps.append(step)
        if step == at:
            signal.raise_signal(signal.SIGINT)

    tensorrt.on_step = ctrl_c
    before, handler = sorted(folder.rglob("*")), signal.getsignal(signal.SIGINT)
    build(folder).refused(130, "Interrupted")
    assert steps[-1] == at, "the build stopped at once"
    assert plan_files(folder) == []
    assert leftovers(folder) == []
    assert [p for p in sorted(folder.rglob("*")) if p.is_file()] == [p for p in before if p.is_file()]
    assert signal.getsignal(signal.SIGINT) is handler
    tensorrt.on_step = None
    assert build(folder).code == 0


def test_a_progress_bar_that_cannot_be_drawn_stops_the_build(copy_bundle, tensorrt, monkeypatch):
    from phreg_deploy.progress import Bars

    def broken(*_, **__):
        raise BrokenPipeError("the terminal went away")

    folder = copy_bundle("bundle")
    monkeypatch.setattr(Bars, "update", broken)
    # Every command exits with 0 if the reader of stderr is gone.
    assert build(folder).code == 0
    assert plan_files(folder) == []


def test_a_full_disk_leaves_no_engine(copy_bundle, tensorrt, monkeypatch):
    import phreg_deploy.bundle.plans as module

    folder = copy_bundle("bundle")

    def full(target, data):
        raise PhregError("output: the disk is full")

    monkeypatch.setattr(module, "draft_file", full)
    build(folder).refused(2, "the disk is full")
    assert plan_files(folder) == []
