"""``auto``: the fastest of the installed backends that answers the bundle's own exam, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from phreg_deploy.bundle import Bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.backends import Backend, installed, open_backend
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.parity import compare_runs, judge
from phreg_deploy.runtime.tuning import Tuning

ROUNDS, LONGEST = 7, 1.0  # timed calls per backend, and seconds after which fewer will do
PAUSE = 0.02  # between calls: one runtime's threads spin for a while, and would slow the next one down


@dataclass
class Candidate:
    """A backend that was tried: its median milliseconds, or what is wrong with it."""

    name: str
    backend: Backend | None = None
    milliseconds: float = float("inf")
    refused: str = ""

    def __str__(self) -> str:
        if self.backend is None:
            return f"{self.name} {self.refused}"
        return f"{self.name} ({self.backend.compute}) {self.milliseconds:.1f} ms"


def choose(bundle: Bundle, tuning: Tuning) -> tuple[Backend, str]:
    """The fastest backend that passes, opened, and the reason in words.

    With one backend installed nothing is measured.

    Raises:
        BackendMissing: none is installed. PhregError: none loads the graph and passes.
    """
    names = installed()
    if len(names) == 1:
        return open_backend(bundle, names[0], tuning), f"{names[0]}: the only one installed"
    case = bundle.cases()[0]
    tried = [_try(bundle, name, tuning, case) for name in names]
    usable = [c for c in tried if c.backend is not None]
    if not usable:
        raise PhregError(f"backend: no installed backend serves {bundle.folder}: {'; '.join(str(c) for c in tried)}.")
    best = min(usable, key=lambda c: _measure(bundle, c, case, len(usable)))
    for candidate in usable:
        if candidate is not best and candidate.backend is not None:
            candidate.backend.close()
    return best.backend, f"{best.name}: " + ", ".join(str(c) for c in tried)  # type: ignore[return-value]


def _try(bundle: Bundle, name: str, tuning: Tuning, case: dict[str, np.ndarray]) -> Candidate:
    try:
        backend = open_backend(bundle, name, tuning)
    except PhregError as error:
        return Candidate(name, refused=f"does not serve it ({error})")
    extractor = FeatureExtractor(bundle, backend)
    missed = judge(
        compare_runs(extractor.run(case["image"]), case, bundle.manifest.norm_median), extractor.precision, exam=True
    )
    if missed:
        backend.close()
        return Candidate(name, refused=f"fails the exam ({'; '.join(missed)})")
    return Candidate(name, backend)


def _measure(bundle: Bundle, candidate: Candidate, case: dict[str, np.ndarray], rivals: int) -> float:
    if rivals == 1:
        return 0.0
    call = FeatureExtractor(bundle, candidate.backend).bare(case["image"])  # type: ignore[arg-type]
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < ROUNDS and (len(times) < 3 or time.perf_counter() - started < LONGEST):
        time.sleep(PAUSE)
        before = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - before))
    candidate.milliseconds = float(np.median(times))
    return candidate.milliseconds
