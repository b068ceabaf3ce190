"""The verdict of one check, and the sheet that collects them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Stored

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"

log = logging.getLogger("phreg_deploy.selftest")


class Skipped(Exception):
    """A check does not apply to this machine; the message says why."""


class Failed(Exception):
    """A check failed; the message says what was expected, and what was found."""


@dataclass(frozen=True)
class Check(Stored):
    """``verdict``: "PASS", "FAIL" or "SKIP" (does not apply here). ``detail``: one sentence. ``seconds``: it took."""

    name: str
    verdict: str
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.verdict}  {self.name}: {self.detail}"


@dataclass(frozen=True)
class Verdict(Stored):
    """All checks in order, and the archive that holds their findings."""

    checks: tuple[Check, ...]
    archive: Path

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.verdict == FAIL]

    @property
    def passed(self) -> bool:
        """Whether no check failed, and at least one passed."""
        return not self.failed and any(check.verdict == PASS for check in self.checks)

    def __str__(self) -> str:
        counts = {kind: sum(check.verdict == kind for check in self.checks) for kind in (PASS, FAIL, SKIP)}
        said = f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIP]} do not apply here"
        return f"{PASS if self.passed else FAIL}: {said}"

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "passed": self.passed, "sentence": str(self)}


@dataclass
class Sheet:
    """Runs checks and keeps their verdicts. ``on_check`` hears of each."""

    on_check: Callable[[Check], None] | None = None
    checks: list[Check] = field(default_factory=list)

    def run(self, name: str, call: Callable[[], str]) -> bool:
        """Run a check and return whether it passed. Whatever it raises is its verdict; the other checks go on.

        Args:
            call: returns the detail of a check that passed, or raises ``Skipped`` or ``Failed``.
        """
        started = time.perf_counter()
        try:
            verdict, detail = PASS, call()
        except Skipped as why:
            verdict, detail = SKIP, str(why)
        except (Failed, PhregError) as why:
            verdict, detail = FAIL, str(why)
        # A library of the device may raise anything, and that is a finding.
        except Exception as error:
            log.debug("%s", name, exc_info=True)
            verdict, detail = FAIL, f"{type(error).__name__}: {error}"
        self._add(Check(name, verdict, " ".join(detail.split()), time.perf_counter() - started))
        return verdict == PASS

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        log.debug("%s (%.1f s)", check, check.seconds)
        if self.on_check is not None:
            self.on_check(check)
