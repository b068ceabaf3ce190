"""``doctor``: show what this machine can run."""

from __future__ import annotations

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import output_options
from phreg_deploy.cli.tables.doctor import show_findings


@click.command()
@output_options
def doctor(as_json: bool, quiet: bool) -> None:
    """Show what this machine can run, and what to type for each part that is missing.

    \b
    Example:
      phreg-deploy doctor
    """
    from phreg_deploy.doctor.doctor import diagnose

    result, findings = Result(as_json, quiet), diagnose()
    show_findings(findings, result)
    result.json({"findings": [f.to_json() for f in findings], "commands": {f.part: f.usable for f in findings}})
