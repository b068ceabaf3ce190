"""Commands that are killed, on full and read-only disks, and twice at once; docs/reliability.md has the counts."""

import shutil
import subprocess

import pytest

from benchmarks.reliability import disk, kills, writers
from benchmarks.reliability.children import Child, run
from benchmarks.reliability.subjects import Subjects

pytestmark = pytest.mark.usefixtures("torch")
QUICK = ("calibrate", "extract --shard 1/1", "build")


@pytest.fixture(scope="module")
def subjects(made_once, photos, base, student, bundle):
    """The small model, its student and bundle, where the figures look for them."""

    def make(folder):
        for name, source in {"photos": photos, "base": base, "student": student, "fixed": bundle}.items():
            shutil.copytree(source, folder / name)

    return Subjects(made_once("reliability", make))


@pytest.mark.parametrize("name", QUICK)
def test_killed_commands_leave_the_old_or_the_new_output(subjects, name):
    found = kills.kill_writers(subjects, 2, [name])
    assert found["to look at"] == []
    row = found["outcomes"][name]
    assert sum(n for hit, n in row["hit"].items() if hit.startswith("SIGKILL")) >= 2
    assert row["run again"] == {"as unharmed": 6}


def can_mount():
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


def test_full_and_read_only_disks_are_refused(subjects):
    if not can_mount():
        pytest.skip("only root mounts a small disk")
    found = disk.press_writers(subjects, 2, ["extract"])
    assert found["to look at"] == []
    assert found["outcomes"]["extract"]["read-only disk"] == {"refused": 2}
    assert found["outcomes"]["extract"]["full disk"] == {"refused": 2}


@pytest.fixture
def case(subjects, tmp_path):
    """A writer, what it writes unharmed, and a case with its older output."""
    case, writer = writers.Case(tmp_path), writers.writers(subjects)["extract"]
    expected = writers.observe(writer, case)
    case.prepare(writer, expected.aged)
    return writer, case, expected


def test_the_judge_sees_what_is_wrong(case):
    """Each planted fault is found."""
    writer, case, expected = case
    assert writers.judge(writer.view(case.output), expected, old=True) == "old"
    next(case.output.glob("*.npy")).write_bytes(b"half")
    assert "neither old nor new" in writers.judge(writer.view(case.output), expected, old=True)
    shutil.rmtree(case.output)
    assert writers.judge(writer.view(case.output), expected, old=True) == "the old output is gone"
    assert writers.judge(writer.view(case.output), expected, old=False) == "absent"
    tally = kills.Tally("extract")
    (case.folder / ".out.left").mkdir()
    (case.place / "tmp" / "left").touch()
    assert kills.run_again(writer, case, expected, False, tally) == [
        "left beside the output: ['.out.left']",
        "left in the folder for temporary files: ['left']",
    ]
    assert writers.judge(writer.view(case.output), expected, old=False) == "new"


def test_a_traceback_and_a_signal_are_seen(tmp_path):
    ended = run(tmp_path, (), "raise ValueError('planted')", warm=False)
    assert (ended.code, ended.traceback) == (1, True)
    assert disk.unclear(ended, disk.REFUSALS) == ["a traceback"]
    ended = Child(tmp_path, (), "while True: pass").wait(0.05)
    assert (ended.code, ended.traceback) == (-9, False)
    assert disk.unclear(ended, disk.REFUSALS) == ["exit code -9 without a reason"]
