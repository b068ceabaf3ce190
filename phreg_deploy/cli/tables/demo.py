"""Tables of ``demo``: base model, student and served bundles side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phreg_deploy.cli.console import Result

if TYPE_CHECKING:
    from phreg_deploy.demo.report import DemoReport

COLUMNS = ["", "base", "student", "served (ONNX Runtime)", "served in INT8"]


def show_demo(report: DemoReport, result: Result) -> None:
    """Print the figures, and where the pictures are."""
    result.table(f"Base and student on {report.scenes} new scenes", COLUMNS, report.table)
    pictures = f"{report.output / 'before-after.png'} and {report.output / 'report.html'}"
    result.say(f"Look at {pictures}. {report.seconds:.0f} s.")
