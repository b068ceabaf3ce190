"""Interrupts, kills and other writers leave the old or the new output, and nothing else."""

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
from phreg_deploy.files import atomic, renames
from phreg_deploy.files.atomic import atomic_folder, check_target, write_atomic
from tests.cli_helpers import ROOT
from tests.output_folders import read_output, write_output
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


def exception_of(call):
    try:
        call()
    except BaseException as error:
        return error
    return None


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
