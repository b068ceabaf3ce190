"""Kill every command that writes an output at random moments of its work, run it again, and count what comes of it."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import track

from benchmarks.reliability.children import Child, run
from benchmarks.reliability.subjects import Subjects
from benchmarks.reliability.writers import Case, Expected, Writer, different, judge, observe, writers

# Of so many cases one is killed while it imports, and one twice in a row.
IMPORTING, TWICE = 5, 6
# Signals that end a command, and the exit codes that it may have then; SIGTERM kills it while it imports.
ENDING = {"SIGINT": (signal.SIGINT, {130}), "SIGTERM": (signal.SIGTERM, {143, -signal.SIGTERM})}
# What may be left where the output stands.
PART = "a part of the new one"
STATES = ("absent", "old", "new", "new, its scores or card not yet")
# Commands that take long, and how many times fewer of their cases there are.
SLOW = {"export --precision int8": 5}
# CPU seconds after which a forked process is in the command line, and no longer in children.py.
EARLIEST = 0.03
# Attempts to hit a command before it ends.
ATTEMPTS = 5


@dataclass
class Tally:
    """Counts of one command; ``bad``: the cases that went wrong, with what repeats them."""

    command: str
    left: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    bad: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"hit": self.hit, "left": self.left, "run again": self.again}


def kill_writers(subjects: Subjects, count: int, names: list[str] | None = None) -> dict[str, Any]:
    """Kill each command ``count`` times, and send a tenth as many SIGINT and SIGTERM each.

    ``names``: of ``writers``; None for all. Half of the cases have an older output that is replaced.
    """
    rows, bad = {}, []
    for name, writer in writers(subjects).items():
        if names is None or name in names:
            with prepared() as case:
                tally = _measure(writer, case, observe(writer, case), max(1, count // SLOW.get(name, 1)))
            rows[name] = tally.to_json()
            bad += tally.bad
    return {"outcomes": rows, "to look at": bad}


@contextmanager
def prepared() -> Iterator[Case]:
    """A case in a folder that is removed afterwards."""
    with TemporaryDirectory(prefix="reliability-") as folder:
        yield Case(Path(folder))


def _measure(writer: Writer, case: Case, expected: Expected, count: int) -> Tally:
    tally = Tally(writer.name)
    for seed in track(range(count), writer.name):
        _judge_case(writer, case, expected, seed, count, tally)
    each = max(2, count // 10)
    for name in ENDING:
        for seed in range(each):
            _judge_case(writer, case, expected, seed, each, tally, name)
    return tally


def _judge_case(
    writer: Writer, case: Case, expected: Expected, seed: int, count: int, tally: Tally, name: str = "SIGKILL"
) -> None:
    """Send one signal, or two in a row, judge what is left, run the command to its end, and judge its output."""
    draw = random.Random(f"{writer.name} {name} {seed}")
    old, warm = seed % 2 == 1, bool(seed % IMPORTING) or name == "SIGINT"
    case.prepare(writer, expected.aged if old else None)
    # Spread evenly: each case draws from a part of its own.
    share = (seed + draw.random()) / count
    moments = [share * (expected.warm if warm else expected.imports)]
    if name == "SIGINT":
        moments = [EARLIEST + share * max(0.0, expected.warm - EARLIEST)]
    if name == "SIGKILL" and seed % TWICE == 0:
        moments.append(draw.random() * expected.warm)
    wrong, told = [], []
    for moment in moments:
        words = words_of(writer, case, old)
        found = _strike(writer, case, words, moment, warm, name, tally)
        told += found.told
        wrong += found.wrong
        state = judge(writer.view(case.output), expected, old)
        if state not in (*STATES, *([PART] if name in ENDING else [])):
            wrong.append(state)
            state = "neither"
        tally.left[state] += 1
        old = old or state == "new"
    wrong += run_again(writer, case, expected, old, tally)
    if wrong:
        tally.bad.append({"command": writer.name, "signal": name, "seed": seed, "sent": told, "found": wrong})


@dataclass
class Struck:
    told: list[str]
    wrong: list[str]


def _strike(
    writer: Writer, case: Case, words: tuple[object, ...], moment: float, warm: bool, name: str, tally: Tally
) -> Struck:
    """Start the command and send the signal; earlier where the command has ended before, from a copy of the case."""
    number, codes = ENDING.get(name, (signal.SIGKILL, {-signal.SIGKILL}))
    before = case.place / "before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(case.folder, before)
    told: list[str] = []
    for _ in range(ATTEMPTS):
        ended = Child(case.place, words, writer.code, warm=warm).wait(moment, number)
        told.append(f"{'warm' if warm else 'cold'}, at {moment:.3f} CPU s: exit code {ended.code}")
        if ended.code != 0:
            break
        moment *= 0.8
        shutil.rmtree(case.folder)
        shutil.copytree(before, case.folder)
    else:
        return Struck(told, ["it ended before each signal"])
    tally.hit[f"{name}, {'at work' if warm else 'while it imports'}"] += 1
    wrong = [] if ended.code in codes else [f"exit code {ended.code}: {ended.error[-600:]}"]
    if ended.traceback:
        wrong.append(f"traceback: {ended.error[-1500:]}")
    if ended.code > 0 and (left := [n for n in case.beside() if n != writer.resumes]):
        wrong.append(f"left after {name}: {left}")
    return Struck(told, wrong)


def words_of(writer: Writer, case: Case, old: bool) -> tuple[object, ...]:
    """The command's words: with ``--resume`` where something is there to resume, else as for a first run."""
    words = writer.words(case.output)
    if old and writer.replaces == ("--force",):
        words += writer.replaces
    if writer.resumes is not None:
        interrupted = (case.folder / writer.resumes / "settings.json").exists() if writer.resumes else True
        if interrupted and "--force" not in words:
            words += ("--resume",)
    return words


def run_again(writer: Writer, case: Case, expected: Expected, old: bool, tally: Tally) -> list[str]:
    """Run the command to its end; return what is wrong with its end or its output."""
    ended = run(case.place, words_of(writer, case, old), writer.code, warm=True)
    if ended.code:
        tally.again[f"exit code {ended.code}"] += 1
        return [f"run again: exit code {ended.code}: {ended.error[-1500:]}"]
    view = writer.view(case.output)
    wrong = [f"run again: {difference}"] if (difference := different(view or {}, expected)) else []
    if beside := case.beside():
        wrong.append(f"left beside the output: {beside}")
    if inside := unfinished(case.output):
        wrong.append(f"left in the output: {inside}")
    if temporary := sorted(case.temporary() - expected.temporary):
        wrong.append(f"left in the folder for temporary files: {temporary}")
    tally.again["as unharmed" if not wrong else "otherwise"] += 1
    return wrong


def unfinished(folder: Path) -> list[str]:
    """Temporary files and folders below a folder."""
    marks = (".writing", ".probe", ".old", ".partial")
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if any(mark in p.name for mark in marks)]
