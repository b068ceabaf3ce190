"""Choose the fastest installed backend that passes the bundle's exam, and say why."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.backends.interface import Backend, Feed
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import installed, open_backend
from phreg_deploy.runtime.feed import InputFeed
from phreg_deploy.runtime.parity import judge_exam

# Timed calls per backend; the seconds after which three are enough; and seconds between calls, because a runtime's
# threads spin for a while and would slow the next backend.
ROUNDS, LONGEST, PAUSE = 7, 1.0, 0.02


@dataclass
class Candidate:
    """A backend that was tried, with the median ``milliseconds`` of its timed calls.

    ``refused``: why it cannot serve the bundle, or "". ``missing``: it is not usable. ``failed``: it fails the exam.
    """

    name: str
    backend: Backend | None = None
    milliseconds: float = float("inf")
    refused: str = ""
    missing: bool = False
    failed: bool = False

    def __str__(self) -> str:
        if self.refused or self.backend is None:
            return f"{self.name} {self.refused}"
        timed = f" {self.milliseconds:.1f} ms" if self.milliseconds < float("inf") else ""
        return f"{self.name} ({self.backend.compute}){timed}"

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()


def choose(bundle: Bundle, options: BackendOptions, examine: bool = True) -> tuple[Backend, str]:
    """Open the fastest backend that passes the exam; returns it with the reason, a line for people.

    With one backend installed nothing is measured.

    Args:
        examine: refuse a bundle that fails its exam on every backend. Commands that check the gates themselves pass
            False: then the first backend that loads the bundle is taken.

    Raises:
        BackendMissing: no backend is installed and usable. PhregError: none loads the graph and passes.
    """
    names = installed()
    if len(names) == 1:
        return open_backend(bundle, names[0], options), f"{names[0]}: the only one installed"
    feed, cases = InputFeed(bundle), bundle.cases()
    tried = [_try(bundle, name, options, feed, cases) for name in names]
    usable = [c for c in tried if not c.refused]
    failed = [c for c in tried if c.failed]
    if not usable and failed and not examine:
        usable, failed = failed[:1], failed[1:]
    for candidate in failed:
        candidate.close()
    if not usable:
        kind = BackendMissing if all(c.missing for c in tried) else PhregError
        raise kind(f"backend: no installed backend serves {bundle.folder}: {'; '.join(str(c) for c in tried)}.")
    first = feed(cases[0]["image"])
    best = min(usable, key=lambda c: _measure(c, first, len(usable)))
    for candidate in usable:
        if candidate is not best:
            candidate.close()
    assert best.backend is not None
    why = "the fastest here; " if len(usable) > 1 else ""
    return best.backend, f"{best.name}: {why}" + ", ".join(str(c) for c in tried)


def _try(bundle: Bundle, name: str, options: BackendOptions, feed: InputFeed, cases: list[Feed]) -> Candidate:
    """Open one backend and run the exam on it."""
    try:
        backend = open_backend(bundle, name, options)
    except PhregError as error:
        return Candidate(name, refused=f"does not serve it ({error})", missing=isinstance(error, BackendMissing))
    try:
        _, gates = judge_exam(bundle, lambda image: backend.run(feed(image)), name, backend.compute, cases)
    except Exception as error:  # runtimes raise errors of many kinds
        backend.close()
        return Candidate(name, refused=f"fails when it runs ({error})")
    missed = [str(gate) for gate in gates if not gate.passed]
    if missed:
        return Candidate(name, backend, refused=f"fails the exam ({'; '.join(missed)})", failed=True)
    return Candidate(name, backend)


def _measure(candidate: Candidate, feed: Feed, rivals: int) -> float:
    """Time a candidate; where it has no rival, skip the measurement."""
    if rivals == 1:
        return 0.0
    assert candidate.backend is not None
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < ROUNDS and (len(times) < 3 or time.perf_counter() - started < LONGEST):
        time.sleep(PAUSE)
        before = time.perf_counter()
        candidate.backend.run(feed)
        times.append(1e3 * (time.perf_counter() - before))
    candidate.milliseconds = float(np.median(times))
    return candidate.milliseconds
