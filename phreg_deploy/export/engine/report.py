"""The result of ``build``, as commands print it and the plan's sidecar stores it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phreg_deploy.bundle.plan_keys import PlanKey
from phreg_deploy.bundle.plans import StoredPlan
from phreg_deploy.errors import PhregError
from phreg_deploy.export.engine.findings import NO, UNKNOWN, Finding
from phreg_deploy.export.engine.inspection import Census


@dataclass(frozen=True)
class BuildReport:
    """What was built, and how good it is.

    ``plan``: the file. ``cached``: it was there already. ``census``: its fused attentions and 8-bit layers.
    ``findings``: the census, judged. ``seconds``: of the build. ``megabytes``: of the file.
    ``warnings``: of TensorRT. ``verdict``: ``parity``, ``gates``, ``missed``, ``passed`` of the bundle's exam; empty
    without one. ``serial``: see ``keep_plan``.
    """

    plan: Path
    key: PlanKey
    cached: bool
    census: Census
    findings: list[Finding]
    seconds: float
    megabytes: float
    warnings: list[str]
    verdict: dict[str, Any]
    serial: int = 0

    @classmethod
    def from_plan(cls, plan: StoredPlan, cached: bool) -> BuildReport:
        """Read the report in a plan's sidecar. Raises ``KeyError``, ``TypeError`` or ``PhregError`` if damaged."""
        fields = dict(plan.report)
        census = Census.from_json(fields.pop("census"))
        findings, warnings = [Finding.from_json(one) for one in fields.pop("findings")], fields.pop("warnings", [])
        for derived in ("short", "doubts"):
            fields.pop(derived, None)
        seconds, megabytes, serial = fields.pop("seconds"), fields.pop("megabytes"), fields.pop("serial", 0)
        # Heads alone have no cosine.
        cosine = fields["parity"]["cosine_p1"] if "parity" in fields else None
        numbers = (seconds, megabytes, 0.0 if cosine is None else cosine)
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError(f"{plan.path}: a figure of another type")
        return cls(plan.path, plan.key, cached, census, findings, seconds, megabytes, warnings, fields, serial)

    @property
    def shortfalls(self) -> list[str]:
        """What the engine lacks of the expected fused attentions and 8-bit layers, as sentences."""
        return [finding.sentence for finding in self.findings if finding.verdict == NO]

    @property
    def doubts(self) -> list[str]:
        """What the inspector does not show, as sentences."""
        return [finding.sentence for finding in self.findings if finding.verdict == UNKNOWN]

    @property
    def missed(self) -> list[str]:
        """The parity gates that the engine misses, as sentences."""
        return list(self.verdict.get("missed", []))

    @property
    def cosine_p1(self) -> float | None:
        """The 1st-percentile patch cosine with the bundle's exam; None without one, or where only heads are served."""
        figure = self.verdict.get("parity", {}).get("cosine_p1")
        return None if figure is None else float(figure)

    def to_sidecar(self) -> dict[str, Any]:
        """Return the part that the sidecar stores; ``keep_plan`` adds the serial number."""
        return {
            "census": self.census.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
            "short": self.shortfalls,
            "doubts": self.doubts,
            "seconds": self.seconds,
            "warnings": self.warnings,
            "megabytes": self.megabytes,
            **self.verdict,
        }

    def to_json(self) -> dict[str, Any]:
        place = {"engine": str(self.plan), "key": self.key.to_json(), "cached": self.cached}
        return {**place, **self.to_sidecar(), "serial": self.serial}


def read_report(plan: StoredPlan, examined: bool) -> BuildReport | None:
    """Return the report of a stored plan; None if it is damaged, or lacks an exam that is wanted."""
    try:
        report = BuildReport.from_plan(plan, cached=True)
    except (KeyError, TypeError, PhregError):
        return None
    return None if examined and "parity" not in report.verdict else report
