"""``demo``: the whole pipeline on the embedded default."""

from __future__ import annotations

from pathlib import Path

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import force_option, output_options
from phreg_deploy.extras import CALIBRATION, EXPORT, require
from phreg_deploy.files.atomic import check_target


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

    Distils, exports, calibrates, checks and serves; writes pictures before and after, a table and a page to look at.

    \b
    Example:
      phreg-deploy demo -o demo-output
    """
    check_target(output, force)
    require("`phreg-deploy demo`", export=EXPORT, calibration=CALIBRATION)
    from phreg_deploy.demo.pipeline import run_demo

    result = Result(as_json, quiet)
    document = run_demo(output, force=force, progress=result.progress)
    result.table(
        f"Base and student on {document['scenes']} new scenes",
        ["", "base", "student", "served (ONNX Runtime)", "served in INT8"],
        document["table"],
    )
    result.say(f"Look at {output / 'before-after.png'} and {output / 'report.html'}. {document['seconds']:.0f} s.")
    result.json(document)
