"""Judge many cases in child processes; a child that hangs, takes too much memory or dies is counted, and replaced."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

# Bounds of one case: seconds of its process, and resident memory in bytes.
SECONDS = 60.0
MEMORY = 2 * 2**30
PAGE = os.sysconf("SC_PAGE_SIZE")

Judge = Callable[[int], tuple[str, str]]


@dataclass(frozen=True)
class Judged:
    """One case: its seed, what came of it, and what was changed."""

    seed: int
    outcome: str
    change: str


def judge_all(judge: Judge, seeds: Iterable[int], seconds: float = SECONDS, memory: int = MEMORY) -> list[Judged]:
    """Call ``judge(seed)``, which returns outcome and change, for every seed in a forked process that is watched.

    An exception of ``judge`` is the outcome "traceback". A child that takes longer than ``seconds`` for one seed is
    "hang", one above ``memory`` bytes "memory", one that ends "crash"; the next child goes on behind that seed.
    """
    left, done = list(seeds), []
    context = multiprocessing.get_context("fork")
    while left:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(judge, left, sender))
        child.start()
        sender.close()
        judged, why = _watch(receiver, child.pid or 0, len(left), seconds, memory)
        child.kill()
        child.join()
        done += judged
        left = left[len(judged) :]
        if left and why:
            done.append(Judged(left.pop(0), why, ""))
    return done


def _work(judge: Judge, seeds: list[int], sender: Connection) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    for seed in seeds:
        try:
            outcome, change = judge(seed)
        except BaseException:
            outcome, change = "traceback", traceback.format_exc()[-1500:]
        sender.send(Judged(seed, outcome, change))
    sender.close()
    os._exit(0)


def _watch(
    receiver: Connection, process: int, count: int, seconds: float, memory: int
) -> tuple[list[Judged], str | None]:
    judged: list[Judged] = []
    since = time.monotonic()
    while len(judged) < count:
        try:
            if receiver.poll(0.05):
                judged.append(receiver.recv())
                since = time.monotonic()
                continue
        except (EOFError, ConnectionError):
            return judged, "crash"
        if time.monotonic() - since > seconds:
            return judged, "hang"
        if _resident(process) > memory:
            return judged, "memory"
    return judged, None


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        return 0
