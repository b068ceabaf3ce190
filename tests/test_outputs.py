"""An output is complete or missing: only --force replaces one, and a full or read-only disk leaves no part of one."""

import errno
import importlib
import os
from pathlib import Path

import numpy as np
import pytest

from tests.cli_helpers import leftovers

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.usefixtures("torch", "traced_once")

DISTILL = ["--epochs", "1", "--batch", "8", "--views", "6", "--device", "cpu", "--precision", "fp32"]
WRITERS = {
    "distill": lambda w, out, *more: ["distill", w.base, "--images", w.photos, "-o", out, *DISTILL, *more],
    "export": lambda w, out, *more: ["export", w.student, "-o", out, "--no-check", *more],
    "extract": lambda w, out, *more: ["extract", w.bundle, w.photos / "frame-00.png", "-o", out, *more],
}
MAIN_FILE = {"distill": "model.safetensors", "export": "model.onnx", "extract": "frame-00.npy"}


@pytest.fixture
def limited():
    """``limited(bytes)`` makes the system refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_fail(monkeypatch, holder, name, number=errno.ENOSPC, when=lambda *_: True, kind=OSError):
    """Make ``holder.name`` fail as it would if the system refused."""
    original = getattr(holder, name)

    def failing(*args, **kwargs):
        if when(*args):
            raise OSError(number, os.strerror(number)) if kind is OSError else kind(os.strerror(number))
        return original(*args, **kwargs)

    monkeypatch.setattr(holder, name, failing)


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_that_exists_needs_force(world, run_cli, command):
    world.out.mkdir()
    (world.out / "mine.txt").write_text("kept")
    run_cli(*WRITERS[command](world, world.out), "--json").refused(2, "exists already", "--force")
    assert snapshot(world.out) == {"mine.txt": b"kept"}
    run_cli(*WRITERS[command](world, world.out, "--force"), "--json").refused(2, "did not write", "choose another name")
    assert snapshot(world.out) == {"mine.txt": b"kept"}
    (world.out / "phreg.json").write_text("{}")
    outcome = run_cli(*WRITERS[command](world, world.out, "--force"), "--json")
    assert outcome.code == 0, outcome.err
    assert (world.out / MAIN_FILE[command]).is_file()
    assert not (world.out / "mine.txt").exists()
    assert leftovers(world.tmp) == []
    assert [p.name for p in world.tmp.iterdir()] == ["out"]


@pytest.mark.parametrize("command", WRITERS)
def test_an_impossible_output_is_refused(world, run_cli, command):
    run_cli(*WRITERS[command](world, world.tmp / "no" / "out"), "--json").refused(
        2, "there is no folder", "create it first"
    )
    assert not (world.tmp / "no").exists()
    (world.tmp / "file").write_text("kept")
    for force in ([], ["--force"]):
        run_cli(*WRITERS[command](world, world.tmp / "file", *force), "--json").refused(2, str(world.tmp / "file"))
    run_cli(*WRITERS[command](world, world.tmp / "file" / "out"), "--json").refused(2, "there is no folder")
    assert (world.tmp / "file").read_text() == "kept"


@pytest.mark.parametrize(("number", "fragments"), [(errno.EROFS, ["Read-only"]), (errno.EACCES, ["Permission denied"])])
@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_that_cannot_be_written_is_refused(world, run_cli, monkeypatch, command, number, fragments):
    words = WRITERS[command](world, world.out)
    make_fail(monkeypatch, Path, "mkdir", number, when=lambda path, *_: path.parent == world.tmp)
    run_cli(*words, "--json").refused(2, "cannot be written to", "choose another folder", *fragments)
    assert list(world.tmp.iterdir()) == []


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_without_a_name_is_refused(world, run_cli, monkeypatch, command):
    words = WRITERS[command](world, ".", "--force")
    monkeypatch.chdir(world.tmp)
    run_cli(*words, "--json").refused(2, "output")


@pytest.mark.parametrize("command", WRITERS)
def test_force_never_replaces_what_the_command_reads(world, run_cli, command):
    """A mistyped output must not delete the photographs, the student or the bundle."""
    source = world.copy({"distill": "photos", "export": "student", "extract": "bundle"}[command])
    words = [source if a in (world.photos, world.student, world.bundle) else a for a in WRITERS[command](world, source)]
    before = snapshot(source)
    run_cli(*words, "--force", "--json").refused(2, "output", str(source))
    assert snapshot(source) == before


# id: (command, options, patched holder and name, how it fails)
STAGES = {
    "cache": ("distill", ["--cache", "CACHE"], ("phreg_deploy.files.atomic", "make_locked_file"), OSError),
    "state": ("distill", [], ("torch", "save"), RuntimeError),
    "student": ("distill", ["--epochs", "0"], ("phreg_deploy.models.checkpoint", "save_for_hf"), OSError),
    "graph": ("export", [], (Path, "write_bytes"), OSError),
    "manifest": ("export", [], (Path, "write_text"), OSError),
    "features": ("extract", [], (np, "save"), OSError),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_reported_and_leaves_nothing(world, run_cli, monkeypatch, stage):
    command, options, (holder, name), kind = STAGES[stage]
    options = [world.tmp / "cache" if o == "CACHE" else o for o in options]
    words = WRITERS[command](world, world.out, *options)
    holder = importlib.import_module(holder) if isinstance(holder, str) else holder
    make_fail(monkeypatch, holder, name, kind=kind)
    outcome = run_cli(*words, "--json")
    outcome.refused(2, "disk is full", "free space")
    assert_clean(world, outcome)


# id: (command, options, bytes at which the disk is full); all that is written before this stage is smaller
WRITES = {
    "targets": ("distill", ["--cache", "CACHE"], 5_000),
    "state": ("distill", [], 600_000),
    "weights": ("distill", ["--epochs", "0"], 100_000),
    "graph": ("export", [], 100_000),
    "features": ("extract", [], 5_000),
    "picture": ("extract", ["--pictures"], 13_000),
}


@pytest.mark.parametrize("stage", WRITES)
def test_a_write_that_the_system_refuses_leaves_nothing(world, run_cli, limited, stage):
    """The system limits file sizes, so that every library fails in its own way."""
    command, options, size = WRITES[stage]
    options = [world.tmp / "cache" if o == "CACHE" else o for o in options]
    words = WRITERS[command](world, world.out, *options)
    limited(size)
    outcome = run_cli(*words, "--json")
    limited(resource.RLIM_INFINITY)
    outcome.refused(2, "was not written" if "disk is full" in outcome.err else "cannot be written")
    # numpy's own message must not reach the user.
    assert "requested and" not in outcome.err
    assert_clean(world, outcome)


@pytest.mark.parametrize(("option", "command"), [("--report", "check"), ("--picture", "artifacts")])
def test_a_page_or_picture_that_cannot_be_written_keeps_the_old_one(world, run_cli, limited, option, command):
    words = [command, world.bundle, "--images", world.photos, "--limit", "1", option, world.tmp / "old"]
    (world.tmp / "old").write_text("kept")
    limited(1_000)
    outcome = run_cli(*words, "--json")
    limited(resource.RLIM_INFINITY)
    outcome.refused(2, "old", "cannot be written")
    assert snapshot(world.tmp) == {"old": b"kept"}


def test_an_interrupted_distillation_is_resumed_or_started_over(world, run_cli, monkeypatch):
    words = WRITERS["distill"](world, world.out, "--json")
    with monkeypatch.context() as patch:
        make_fail(patch, importlib.import_module("phreg_deploy.models.checkpoint"), "save_for_hf")
        run_cli(*words).refused(2, "disk is full")
    run_cli(*words).refused(2, "interrupted run", "--resume", "--force")
    run_cli(*words, "--resume", "--seed", "1").refused(2, "other settings", "seed")
    resumed = run_cli(*words, "--resume")
    assert resumed.code == 0, resumed.err
    assert len(resumed.document["history"]["loss"]) == 1
    assert [p.name for p in world.tmp.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["state.pt", "settings.json"])
def test_a_damaged_interrupted_run_is_refused(world, run_cli, monkeypatch, name):
    words = WRITERS["distill"](world, world.out, "--json")
    with monkeypatch.context() as patch:
        make_fail(patch, importlib.import_module("phreg_deploy.models.checkpoint"), "save_for_hf")
        run_cli(*words).refused(2, "disk is full")
    partial = world.tmp / "out.partial" / name
    partial.write_bytes(partial.read_bytes()[: partial.stat().st_size // 2])
    run_cli(*words, "--resume").refused(2, "out.partial", "--force")
    started = run_cli(*words, "--force")
    assert started.code == 0, started.err


def test_a_full_folder_for_temporary_files_is_named(world, run_cli, limited, monkeypatch):
    """ONNX Runtime says only that it cannot write the optimized graph."""
    from phreg_deploy.calibration import kernels

    words = ["calibrate", world.bundle, "--images", world.photos, "-o", world.out, "--json"]
    usage = kernels.shutil.disk_usage(world.tmp)
    limited(5_000)
    with monkeypatch.context() as patch:
        patch.setattr(kernels.shutil, "disk_usage", lambda _: usage._replace(free=5_000))
        full = run_cli(*words)
    limited(resource.RLIM_INFINITY)
    full.refused(2, "the disk is full", "for temporary files", "TMPDIR")
    assert list(world.tmp.iterdir()) == []


def test_no_folder_for_temporary_files_is_a_message(world, run_cli, limited, monkeypatch):
    words = ["calibrate", world.bundle, "--images", world.photos, "-o", world.out, "--json"]
    monkeypatch.setattr("tempfile.tempdir", str(world.tmp / "none"))
    run_cli(*words).refused(2, "phreg-kernels", "No such file or directory")
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(world.tmp / "none")])
    run_cli(*words).refused(2, "No usable temporary directory", "TMPDIR")
    assert list(world.tmp.iterdir()) == []


def test_the_state_of_another_run_does_not_meet_new_settings(world, run_cli, monkeypatch):
    """A process that was killed while it removed its work may leave the training state without its settings."""
    from phreg_deploy.distill import distillation

    words = WRITERS["distill"](world, world.out, "--json")
    with monkeypatch.context() as patch:
        make_fail(patch, importlib.import_module("phreg_deploy.models.checkpoint"), "save_for_hf")
        run_cli(*words).refused(2, "disk is full")
    partial = world.tmp / "out.partial"
    (partial / "settings.json").unlink()
    assert (partial / "state.pt").exists()

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "train", interrupted)
        run_cli(*words, "--seed", "1").refused(130, "--resume")
    assert [p.name for p in partial.iterdir()] == ["settings.json"]
    resumed, fresh = world.out, world.tmp / "fresh"
    assert run_cli(*words, "--seed", "1", "--resume").code == 0
    assert run_cli(*WRITERS["distill"](world, fresh, "--seed", "1")).code == 0
    weights = "model.safetensors"
    assert (resumed / weights).read_bytes() == (fresh / weights).read_bytes()


def test_two_distillations_of_one_output_are_refused(world, run_cli):
    pytest.importorskip("fcntl")
    from phreg_deploy.files.temporary import open_locked

    words, partial = WRITERS["distill"](world, world.out, "--json"), world.tmp / "out.partial"
    partial.mkdir()
    (partial / "settings.json").write_text("theirs")
    lock = open_locked(partial)
    for more in ([], ["--resume"], ["--force"]):
        run_cli(*words, *more).refused(2, "another process is at work", str(partial))
    assert snapshot(partial) == {"settings.json": b"theirs"}
    os.close(lock)
    assert run_cli(*words, "--force").code == 0
    assert [p.name for p in world.tmp.iterdir()] == ["out"]


def test_outputs_follow_the_umask(world, run_cli, tmp_path):
    """Other users can read every file that the umask lets them read, the weights included."""
    before = os.umask(0o026)
    try:
        for command in WRITERS:
            out = tmp_path / command
            more = ["--epochs", "0"] if command == "distill" else []
            assert run_cli(*WRITERS[command](world, out, *more)).code == 0
        page = tmp_path / "page.html"
        assert run_cli("check", world.bundle, "--report", page).code == 0
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert oct(path.stat().st_mode & 0o777) == oct(0o751 if path.is_dir() else 0o640), path


@pytest.mark.parametrize(("option", "command"), [("--report", "check"), ("--picture", "artifacts")])
def test_a_page_or_picture_in_a_read_only_folder_is_refused_before_any_work(
    world, run_cli, monkeypatch, option, command
):
    words = [command, world.bundle, "--images", world.photos, option, world.tmp / "page", "--json"]
    make_fail(monkeypatch, importlib.import_module("tempfile"), "TemporaryFile", errno.EROFS)
    monkeypatch.setattr(
        "phreg_deploy.runtime.features.FeatureExtractor.load", lambda *_, **__: pytest.fail("it loaded")
    )
    run_cli(*words).refused(2, "cannot be written to", "Read-only")
    assert list(world.tmp.iterdir()) == []


def test_a_read_only_file_system_is_a_message(tmp_path, monkeypatch):
    """The system refuses even to remove a file that does not exist there."""
    from phreg_deploy.errors import PhregError
    from phreg_deploy.files.atomic import write_atomic

    make_fail(monkeypatch, os, "open", errno.EROFS)
    make_fail(monkeypatch, Path, "unlink", errno.EROFS)
    with pytest.raises(PhregError, match=r"cannot be written to \(Read-only file system\)"):
        write_atomic(tmp_path / "page.html", b"page")


def assert_clean(world, outcome):
    """Assert that no output and no temporary file is left; an interrupted distillation may keep its state."""
    assert not world.out.exists()
    partial = world.tmp / "out.partial"
    names = [name for name in leftovers(world.tmp) if name.split(os.sep)[0] != partial.name]
    assert names == []
    if partial.exists():
        assert {p.name for p in partial.iterdir()} <= {"settings.json", "state.pt"}
        assert "Nothing was left behind" not in outcome.err
