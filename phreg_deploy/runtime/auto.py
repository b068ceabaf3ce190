"""``auto``: the fastest of the installed backends that answers the bundle's own exam, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.backends.interface import Backend
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.backends.registry import installed, open_backend
from phreg_deploy.runtime.feed import InputFeed
from phreg_deploy.runtime.parity import gate_precision, missed_gates, run_exam, worst, writes_exams

ROUNDS, LONGEST = 7, 1.0  # timed calls per backend, and seconds after which fewer will do
PAUSE = 0.02  # between calls: one runtime's threads spin for a while, and would slow the next one down


@dataclass
class Candidate:
    """A backend that was tried: its median milliseconds, or what is wrong with it."""

    name: str
    backend: Backend | None = None
    milliseconds: float = float("inf")
    refused: str = ""
    missing: bool = False
    failed: bool = False  # it runs, but fails the exam

    def __str__(self) -> str:
        if self.refused or self.backend is None:
            return f"{self.name} {self.refused}"
        timed = f" {self.milliseconds:.1f} ms" if self.milliseconds < float("inf") else ""
        return f"{self.name} ({self.backend.compute}){timed}"


def choose(bundle: Bundle, tuning: BackendOptions, examine: bool = True, device: int = 0) -> tuple[Backend, str]:
    """The fastest backend that passes, opened, and the reason in words.

    With one backend installed nothing is measured.

    Args:
        examine: refuse a bundle that fails its exam everywhere; otherwise the first backend that loads it is taken, for
            commands that missed_gates it themselves.

    Raises:
        BackendMissing: none is installed, or none can be imported. PhregError: none loads the graph and passes.
    """
    names = installed()
    if len(names) == 1:
        return open_backend(bundle, names[0], tuning, device), f"{names[0]}: the only one installed"
    feed = InputFeed(bundle)
    tried = [_try(bundle, name, tuning, feed, device) for name in names]
    usable = [c for c in tried if not c.refused]
    failed = [c for c in tried if c.failed]
    if not usable and failed and not examine:
        usable, failed = failed[:1], failed[1:]
    for candidate in failed:
        candidate.backend.close()  # type: ignore[union-attr]
    if not usable:
        kind = BackendMissing if all(c.missing for c in tried) else PhregError
        raise kind(f"backend: no installed backend serves {bundle.folder}: {'; '.join(str(c) for c in tried)}.")
    first = feed(bundle.cases()[0]["image"])
    best = min(usable, key=lambda c: _measure(c, first, len(usable)))
    for candidate in usable:
        if candidate is not best and candidate.backend is not None:
            candidate.backend.close()
    return best.backend, f"{best.name}: " + ", ".join(str(c) for c in tried)  # type: ignore[return-value]


def _try(bundle: Bundle, name: str, tuning: BackendOptions, feed: InputFeed, device: int) -> Candidate:
    try:
        backend = open_backend(bundle, name, tuning, device)
    except PhregError as error:
        return Candidate(name, refused=f"does not serve it ({error})", missing=isinstance(error, BackendMissing))
    try:
        cases = run_exam(bundle, lambda image: backend.run(feed(image)))
    except Exception as error:  # what a runtime raises when it runs, whatever it is
        backend.close()
        return Candidate(name, refused=f"fails when it runs ({error})")
    manifest = bundle.manifest
    missed = missed_gates(
        worst([case.parity for case in cases]),
        gate_precision(manifest, backend.compute),
        exam=True,
        again=writes_exams(manifest, name),
    )
    if missed:
        return Candidate(name, backend, refused=f"fails the exam ({'; '.join(missed)})", failed=True)
    return Candidate(name, backend)


def _measure(candidate: Candidate, feed: dict[str, np.ndarray], rivals: int) -> float:
    if rivals == 1:
        return 0.0
    assert candidate.backend is not None  # only those that passed are measured
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < ROUNDS and (len(times) < 3 or time.perf_counter() - started < LONGEST):
        time.sleep(PAUSE)
        before = time.perf_counter()
        candidate.backend.run(feed)
        times.append(1e3 * (time.perf_counter() - before))
    candidate.milliseconds = float(np.median(times))
    return candidate.milliseconds
