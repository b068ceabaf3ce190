"""Interrupts, kills, equal process numbers and other writers leave the old or the new output, and nothing else."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from phreg_deploy.arguments import check_resume
from phreg_deploy.errors import PhregError
from phreg_deploy.files import atomic, renames, temporary
from phreg_deploy.files.atomic import atomic_folder, check_target, write_atomic
from tests.cli_helpers import ROOT
from tests.threads import run_in_threads

STEPS = {"one step": [(atomic, "exchange")], "three steps": [(os, "rename"), (atomic, "claim")]}


@pytest.fixture(params=STEPS)
def steps(request, monkeypatch):
    """Both ways to replace an output: in one step, if the system can exchange two names, and in three."""
    if request.param == "three steps":
        monkeypatch.setattr(renames, "_renameat2", lambda: None)
    elif not can_exchange():
        pytest.skip("this system exchanges no names")
    return request.param


def can_exchange():
    return sys.platform == "linux" and renames._renameat2() is not None


def write_output(target, text, force=True, meanwhile=lambda: None):
    with atomic_folder(target, force) as folder:
        (folder / "manifest.json").write_text(text)
        (folder / "other").write_text(text)
        meanwhile()


def exception_of(call):
    try:
        call()
    except BaseException as error:
        return error
    return None


def read_output(target):
    """Return the text of an output; assert that both of its files have the same text."""
    texts = {p.name: p.read_text() for p in target.iterdir()}
    assert set(texts) == {"manifest.json", "other"}
    assert len(set(texts.values())) == 1
    return texts["other"]


def test_force_replaces_and_leaves_nothing_else(tmp_path, steps):
    for text in ("old", "new", "newer"):
        write_output(tmp_path / "out", text)
        assert read_output(tmp_path / "out") == text
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode, "the permissions are those of a new folder"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_an_interrupt_at_any_step_leaves_the_old_or_the_new(tmp_path, steps, late, kind):
    for owner, name in STEPS[steps]:
        write_output(tmp_path / "out", "old")
        for at in range(1, 9):
            real, calls = getattr(owner, name), []

            def broken(*arguments, real=real, calls=calls, at=at):
                calls.append(1)
                if len(calls) == at and not late:
                    raise kind
                done = real(*arguments)
                if len(calls) == at:
                    raise kind
                return done

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, broken)
                interrupted = exception_of(lambda: write_output(tmp_path / "out", "new"))
            assert read_output(tmp_path / "out") in ("old", "new")
            # This removes what an interrupted removal left.
            check_target(tmp_path / "out", force=True)
            assert [p.name for p in tmp_path.iterdir()] == ["out"]
            if interrupted is None:
                # The function was called fewer than ``at`` times.
                break
            assert isinstance(interrupted, (kind, PhregError))
            write_output(tmp_path / "out", "old")
        assert at > 1, f"{name} was never called"


LOOP = """
import signal, sys
from pathlib import Path
# A shell starts background processes with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from phreg_deploy.files import renames
from phreg_deploy.files.atomic import atomic_folder
if sys.argv[2] == "three steps":
    renames._renameat2 = lambda: None
for i in range(10**9):
    with atomic_folder(Path(sys.argv[1]), True) as folder:
        (folder / "manifest.json").write_text(str(i))
        (folder / "other").write_text(str(i))
    if i == 0:
        print("running", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_real_signal_at_any_moment_leaves_a_whole_output(tmp_path, steps, number):
    draw = random.Random(5)
    for _ in range(5):
        command = [sys.executable, "-c", LOOP, str(tmp_path / "out"), steps]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout.readline() == "running\n"
            time.sleep(draw.uniform(0, 0.02))
            child.send_signal(number)
            try:
                assert child.wait(20) != 0
            finally:
                child.kill()
        if number == signal.SIGINT or steps == "one step":
            read_output(tmp_path / "out")
        # The next run removes the leftovers.
        with pytest.raises(PhregError, match="exists already"):
            check_target(tmp_path / "out", force=False)
        read_output(tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


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


@pytest.mark.parametrize("rival", ["folder", "empty", "file", "link"])
def test_an_output_that_appears_meanwhile_is_kept(tmp_path, steps, rival):
    if rival == "empty" and steps == "three steps":
        pytest.skip("an empty folder that appears at the last moment may be replaced there")
    target = tmp_path / "out"

    def appear():
        if rival == "folder":
            write_output(target, "theirs", force=False)
        elif rival == "empty":
            target.mkdir()
        elif rival == "file":
            target.write_text("theirs")
        else:
            target.symlink_to("nowhere")

    with pytest.raises(PhregError, match=r"appeared while this was at work.*--force"):
        write_output(target, "ours", force=False, meanwhile=appear)
    assert {
        "folder": lambda: read_output(target) == "theirs",
        "empty": lambda: list(target.iterdir()) == [],
        "file": target.is_file,
        "link": target.is_symlink,
    }[rival]()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_of_several_writers_without_force_one_wins(tmp_path, steps):
    for i in range(10):
        target, outcomes, refusals, start = tmp_path / str(i), [], [], threading.Barrier(4)

        def work(number, target=target, outcomes=outcomes, refusals=refusals, start=start):
            try:
                with atomic_folder(target) as folder:
                    (folder / "manifest.json").write_text(str(number))
                    (folder / "other").write_text(str(number))
                    start.wait()
                outcomes.append(number)
            except PhregError as error:
                refusals.append(str(error))

        assert run_in_threads(work, range(4)) == []
        assert outcomes == [int(read_output(target))]
        assert len(refusals) == 3
        assert all("appeared while this was at work" in message for message in refusals)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_of_several_writers_with_force_the_last_one_wins_whole(tmp_path, steps):
    target = tmp_path / "out"

    def write_ten_times(number):
        for _ in range(10):
            write_output(target, str(number))

    assert run_in_threads(write_ten_times, range(3)) == []
    assert read_output(target) in "012"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("to", ["real", "nowhere"])
def test_a_symbolic_link_is_no_output(tmp_path, to, force):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(to)
    with pytest.raises(PhregError, match=f"symbolic link to {to}"):
        check_target(tmp_path / "out", force)
    assert (tmp_path / "out").is_symlink()
    assert list((tmp_path / "real").iterdir()) == []


def test_two_writers_of_one_file_leave_one_whole_file(tmp_path):
    """The last writer's file is complete, and no writer removes the temporary file of another."""
    target = tmp_path / "file"

    def write_fifty_times(letter):
        for _ in range(50):
            write_atomic(target, letter * 1000)

    assert run_in_threads(write_fifty_times, (b"a", b"b", b"c")) == []
    assert len(target.read_bytes()) == 1000
    assert len(set(target.read_bytes())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_message_names_the_option_and_the_argument(tmp_path):
    with pytest.raises(PhregError, match=r"add --force \(in Python force=True\) to replace it"):
        check_target(tmp_path, force=False)
    (tmp_path / "settings.json").touch()
    with pytest.raises(PhregError, match=r"add --resume \(in Python resume=True\), or --force"):
        check_resume(tmp_path, resume=False, force=False)


@pytest.mark.parametrize("make", [temporary.make_locked_folder, temporary.make_locked_file])
def test_an_interrupt_before_the_lock_leaves_nothing(tmp_path, monkeypatch, make):
    def interrupted(*_arguments):
        assert list(tmp_path.iterdir()), "it was made"
        raise KeyboardInterrupt

    monkeypatch.setattr(temporary, "_lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out")
    assert not list(tmp_path.iterdir())
