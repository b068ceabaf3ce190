"""Tables of ``calibrate`` and of ``export --precision int8``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phreg_deploy.cli.console import Result, figure, percent

if TYPE_CHECKING:
    from phreg_deploy.calibration import CalibrationReport

# Layers in the table; calibration.json lists all.
MOST_LAYERS = 8


def show_calibration(report: CalibrationReport, result: Result) -> None:
    """Print the fidelity, the most sensitive layers, the missed gates and the next command."""
    _show_fidelity(report, result)
    _show_sensitive_layers(report, result)
    for line in report.missed:
        result.say(f"Missed: {line}. The manifest says so.")
    smoothing = report.smoothing
    result.say(
        f"Wrote {report.output} in {report.seconds:.0f} s; smoothing: layer norms {figure(smoothing.norm)}, values "
        f"{figure(smoothing.value)}, hidden units {figure(smoothing.hidden)}. Next: phreg-deploy check {report.output}"
    )


def _show_fidelity(report: CalibrationReport, result: Result) -> None:
    mode, fidelity, bar = report.mode.upper(), report.fidelity, report.bar
    rows: list[list[Any]] = [
        ["patch cosine, mean", fidelity.cosine_mean, ""],
        ["    1st percentile", fidelity.cosine_p1, f"at least {bar['cosine_p1']}"],
        ["nearest-neighbour agreement", fidelity.neighbours, f"at least {bar['neighbours']}"],
        ["norm-outlier rate, change in points", fidelity.outlier_points, f"at most {bar['outlier_points']}"],
        ["class token cosine, smallest", fidelity.cls_cosine, ""],
        ["linear layers in 8 bits", report.integer_layers, f"of {len(report.layers)}"],
        ["linear MACs left in float", percent(report.float_macs), ""],
    ]
    title = f"{mode} against FP32 on {len(report.images.report)} images that took part in no choice"
    result.table(title, ["", mode, "bar"], rows)


def _show_sensitive_layers(report: CalibrationReport, result: Result) -> None:
    layers = sorted(report.layers, key=lambda layer: -layer.sensitivity.mean)[:MOST_LAYERS]
    rows = [[n.name, n.sensitivity.mean, n.sensitivity.p1, percent(n.macs), n.precision] for n in layers]
    result.table(
        "Most sensitive layers: what 1 - cosine loses when each alone goes back to float",
        ["layer", "mean", "1st percentile", "share of MACs", "runs in"],
        rows,
    )
