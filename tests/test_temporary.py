"""Temporary files and folders: equal process numbers, leftovers of killed processes, and what comes back."""

import os
import signal
import subprocess
import sys

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.files import atomic, temporary
from phreg_deploy.files.atomic import atomic_folder
from tests.cli_helpers import ROOT
from tests.output_folders import read_output, write_output


def test_processes_with_equal_numbers_do_not_share_temporary_files(tmp_path, monkeypatch):
    """The first process of every container has number 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for name in (".out.writing-1", ".out.probe-1", ".out.old-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs").write_text("kept")
    with atomic_folder(tmp_path / "out", True) as first:
        (first / "manifest.json").write_text("first")
        write_output(tmp_path / "out", "second")
        assert (first / "manifest.json").read_text() == "first"
        (first / "other").write_text("first")
    assert read_output(tmp_path / "out") == "first"
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.writing-1", ".out.probe-1", ".out.old-1"}


def test_a_temporary_folder_of_another_process_is_kept(tmp_path, monkeypatch):
    taken = tmp_path / ".out.writing-000000000000"
    taken.mkdir()
    (taken / "theirs").write_text("kept")
    monkeypatch.setattr(temporary.secrets, "token_hex", lambda _: "0" * 12)
    monkeypatch.setattr(atomic, "remove_dead", lambda *_: None)
    with pytest.raises(PhregError, match="cannot be written"):
        write_output(tmp_path / "out", "new")
    assert (taken / "theirs").read_text() == "kept"


def leave_temporary(folder, kind, text, target="out"):
    path = temporary.temporary(folder / target, kind)
    path.mkdir()
    for name in ("manifest.json", "other"):
        (path / name).write_text(text)
    return path


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    pytest.importorskip("fcntl")
    leave_temporary(tmp_path, "writing", "half")
    other = leave_temporary(tmp_path, "writing", "half", "another")
    alive = leave_temporary(tmp_path, "writing", "half")
    lock = temporary.open_locked(alive)
    write_output(tmp_path / "out", "new")
    assert {p.name for p in tmp_path.iterdir()} == {"out", alive.name, other.name}
    os.close(lock)
    write_output(tmp_path / "out", "newer")
    assert {p.name for p in tmp_path.iterdir()} == {"out", other.name}


def test_a_scratch_folder_of_a_killed_process_goes_with_the_next_one(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed = """
import os, signal
from phreg_deploy.files.temporary import scratch_folder
with scratch_folder("work") as folder:
    (folder / "large").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", killed], cwd=ROOT, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with temporary.scratch_folder("other"):
        assert left.exists(), "another kind of work removed it"
    with temporary.scratch_folder("work") as folder, temporary.scratch_folder("work") as second:
        assert not left.exists()
        assert folder != second
        assert folder.stat().st_mode & 0o077 == 0, "others may read it"
    assert list(tmp_path.iterdir()) == []


def test_an_old_output_that_a_killed_process_moved_aside_comes_back(tmp_path):
    pytest.importorskip("fcntl")
    leave_temporary(tmp_path, "old", "old")
    with pytest.raises(PhregError, match="exists already"):
        write_output(tmp_path / "out", "new", force=False)
    assert read_output(tmp_path / "out") == "old"
    leave_temporary(tmp_path, "old", "older")
    write_output(tmp_path / "out", "new")
    assert read_output(tmp_path / "out") == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("make", [temporary.make_locked_folder, temporary.make_locked_file])
def test_an_interrupt_before_the_lock_leaves_nothing(tmp_path, monkeypatch, make):
    def interrupted(*_arguments):
        assert list(tmp_path.iterdir()), "it was made"
        raise KeyboardInterrupt

    monkeypatch.setattr(temporary, "_lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out")
    assert not list(tmp_path.iterdir())
