"""Table of ``doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phreg_deploy.cli.console import Result

if TYPE_CHECKING:
    from phreg_deploy.doctor.system import Finding


def show_findings(findings: list[Finding], result: Result) -> None:
    """Print each part, its state, and what to do."""
    rows = [[f.part, f.state, f.purpose, f.mend or ""] for f in findings]
    result.table("What this machine can run", ["part", "state", "for", "what to do"], rows)
