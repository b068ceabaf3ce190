"""The command ``demo``: run the whole pipeline on the model that comes with the package."""

from __future__ import annotations

from pathlib import Path

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import force_option, output_options
from phreg_deploy.cli.tables.demo import show_demo


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder to write into.",
)
@force_option
@output_options
def demo(output: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Run the whole pipeline on a small model and scenes that come with the package: no network, no GPU.

    Distils, exports, calibrates, checks and serves; writes pictures before and after, a table and an HTML report.

    \b
    Example:
      phreg-deploy demo -o demo-output
    """
    from phreg_deploy.demo import run_demo

    result = Result(as_json, quiet)
    report = run_demo(output, force=force, progress=result.progress)
    show_demo(report, result)
    result.json(report.to_json())
