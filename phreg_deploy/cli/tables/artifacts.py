"""Tables of ``artifacts``: scores of the features, and token norms block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phreg_deploy.cli.console import Result, percent

if TYPE_CHECKING:
    from phreg_deploy.verify.report import ArtifactReport

PERCENTILES = "    1 - cosine, percentiles 50 / 90 / 95 / 99"
LAYERS = ["layer", "median norm", "largest / median", "norm-outlier rate"]
BLOCKS = ["block", "median norm", "largest / median", "above 2x"]


def show_artifacts(report: ArtifactReport, result: Result) -> None:
    """Print the scores of a model or a bundle; and the norms after each block of a PyTorch model."""
    outliers, shift = report.scores.norm_outliers, report.scores.shift_incoherence
    rows: list[list[Any]] = [
        ["norm-outlier rate", percent(outliers.rate)],
        ["    high / low", f"{percent(outliers.upper)} / {percent(outliers.lower)}"],
        ["largest norm / median", outliers.largest],
        ["median norm measured against", outliers.median],
    ]
    if shift is not None:
        values = " / ".join(f"{value:.3f}" for value in (shift.p50, shift.p90, shift.p95, shift.p99))
        rows += [["shift incoherence", percent(shift.rate)], [PERCENTILES, values]]
    result.table(f"Artifacts of {report.model} on {report.scores.images} images", ["score", "value"], rows)
    if report.layers:
        rows = [[name, o.median, o.largest, percent(o.rate)] for name, o in report.layers.items()]
        result.table("Further layers, over patch tokens", LAYERS, rows)
    if report.blocks:
        rows = [[str(i), b["median"], b["largest"], percent(b["rate"])] for i, b in enumerate(report.blocks)]
        result.table("Block by block, over patch tokens", BLOCKS, rows)
