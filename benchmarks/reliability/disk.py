"""Run every command that writes an output on a full disk, in a read-only folder, and twice at once."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.reliability.children import Child, Ended
from benchmarks.reliability.kills import Tally, prepared, run_again, words_of
from benchmarks.reliability.subjects import Subjects
from benchmarks.reliability.writers import Case, Expected, Writer, files_of, judge, observe, writers

# What the message of a refused write says, in one of these words.
REFUSALS = ("disk is full", "cannot be written", "No space left on device")
# Bytes of a disk with room for everything.
LARGE = 1 << 30
# The message that refuses the second of two writers has one of these words.
RIVALS = ("exists already", "appeared while this was at work", "another process")
Found = tuple[str, list[str], str]


def press_writers(subjects: Subjects, count: int, names: list[str] | None = None) -> dict[str, Any]:
    """Run each command ``count`` times under each kind of ``KINDS``, half of them over an older output.

    ``names``: of ``writers``; None for all. Disks are tmpfs of a chosen size, which only root may mount; raises
    ``SystemExit`` without that right.
    """
    rows, bad = {}, []
    for name, writer in writers(subjects).items():
        if names is not None and name not in names:
            continue
        with prepared() as case:
            expected = observe(writer, case)
            rows[name] = {kind: Counter[str]() for kind in KINDS}
            for kind, seed in track([(kind, seed) for kind in KINDS for seed in range(count)], name):
                outcome, wrong, told = KINDS[kind](writer, case, expected, seed % 2 == 1, (seed + 0.5) / count)
                rows[name][kind]["wrong" if wrong else outcome] += 1
                if wrong:
                    bad.append({"command": name, "kind": kind, "seed": seed, "told": told, "found": wrong})
    return {"outcomes": rows, "to look at": bad}


def _full(writer: Writer, case: Case, expected: Expected, old: bool, share: float) -> Found:
    """A disk with room for a share of what the command writes there."""
    case.prepare(None)
    with _mounted(case.folder, LARGE):
        case.fill(writer, expected.aged if old else None)
        given = files_of(writer.given) or {} if writer.given else {}
        room = int(share * sum(len(data) for name, data in expected.new.items() if name not in given))
        _remount(case.folder, f"size={_occupied(case.folder) + room}")
        return _refused(writer, case, expected, old, lambda: _remount(case.folder, f"size={LARGE}"))


def _full_temporary(writer: Writer, case: Case, expected: Expected, old: bool, share: float) -> Found:
    """A folder for temporary files with room for 64 kB at most, which few commands need."""
    case.prepare(writer, expected.aged if old else None)
    with _mounted(case.place / "tmp", 4096 + int(share * 65536)):
        return _refused(writer, case, expected, old, lambda: _remount(case.place / "tmp", f"size={LARGE}"))


def _read_only(writer: Writer, case: Case, expected: Expected, old: bool, _share: float) -> Found:
    """A file system that is mounted read-only."""
    case.prepare(None)
    with _mounted(case.folder, LARGE):
        case.fill(writer, expected.aged if old else None)
        _remount(case.folder, "ro")
        return _refused(writer, case, expected, old, lambda: _remount(case.folder, "rw"))


def _refused(writer: Writer, case: Case, expected: Expected, old: bool, free: Callable[[], None]) -> Found:
    """Run the command: if it is refused, it must say why, and leave nothing. ``free`` makes room for the next run."""
    ended = Child(case.place, words_of(writer, case, old), writer.code, warm=True).wait()
    state = judge(writer.view(case.output), expected, old)
    wrong = unclear(ended, REFUSALS)
    if state not in (("new",) if ended.code == 0 else ("absent", "old", "new, its scores or card not yet")):
        wrong.append(f"exit code {ended.code}, and: {state}")
    if beside := [name for name in case.beside() if name != writer.resumes]:
        wrong.append(f"left beside the output: {beside}")
    free()
    wrong += run_again(writer, case, expected, old or state.startswith("new"), Tally(writer.name))
    return "done" if ended.code == 0 else "refused", wrong, ended.error[-1500:]


def _two(writer: Writer, case: Case, expected: Expected, old: bool, share: float) -> Found:
    """Two processes of the same command; the second begins at a share of the first one's time."""
    case.prepare(writer, expected.aged if old else None)
    words = words_of(writer, case, old)
    first = Child(case.place, words, writer.code, warm=True, name="first")
    first.wait_until(share * expected.warm)
    second = Child(case.place, words, writer.code, warm=True, name="second")
    both = [first.wait(), second.wait()]
    wrong = [text for ended in both for text in unclear(ended, RIVALS)]
    if all(ended.code for ended in both):
        wrong.append("neither of them wrote the output")
    state = judge(writer.view(case.output), expected, old=False)
    if state != "new":
        wrong.append(f"afterwards: {state}")
    if beside := case.beside():
        wrong.append(f"left beside the output: {beside}")
    outcome = "both wrote it whole" if not any(ended.code for ended in both) else "one was refused"
    return outcome, wrong, "\n".join(ended.error[-700:] for ended in both)


def unclear(ended: Ended, reasons: tuple[str, ...]) -> list[str]:
    """What is wrong with how a command ended: it is done, or says one of the reasons with exit code 2."""
    message = " ".join(ended.error.split())
    if ended.traceback:
        return ["a traceback"]
    if ended.code == 0 or (ended.code == 2 and "Error: " in message and any(reason in message for reason in reasons)):
        return []
    return [f"exit code {ended.code} without a reason"]


KINDS: dict[str, Callable[[Writer, Case, Expected, bool, float], Found]] = {
    "full disk": _full,
    "full folder for temporary files": _full_temporary,
    "read-only disk": _read_only,
    "two at once": _two,
}


@contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    """Mount a tmpfs of so many bytes on an empty folder for the block."""
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _remount(folder: Path, options: str) -> None:
    _mount("-o", f"remount,{options}", folder)


def _mount(*words: object) -> None:
    done = subprocess.run(["mount", *(str(word) for word in words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"disk: a tmpfs cannot be mounted ({done.stderr.strip()}); run this as root.")


def _occupied(folder: Path) -> int:
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
