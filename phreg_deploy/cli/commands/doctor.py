"""``doctor``: what this machine can run."""

from __future__ import annotations

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import (
    output_options,
)


@click.command()
@output_options
def doctor(as_json: bool, quiet: bool) -> None:
    """Say what this machine can run, and the line that mends each thing that is missing.

    \b
    Example:
      phreg-deploy doctor
    """
    from phreg_deploy.doctor.doctor import diagnose

    result = Result(as_json, quiet)
    findings = diagnose()
    result.table(
        "What this machine can run",
        ["part", "state", "for", "what to do"],
        [[f.part, f.state, f.purpose, f.mend or ""] for f in findings],
    )
    result.json({"findings": [f.to_json() for f in findings], "commands": {f.part: f.usable for f in findings}})
