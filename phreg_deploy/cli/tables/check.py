"""Tables of ``check``: parity, gates and artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phreg_deploy.cli.console import Result, figure, percent

if TYPE_CHECKING:
    from phreg_deploy.verify.report import ArtifactRates, CheckReport, Comparison

PARITY = [
    "compared with", "size", "cosine p1", "cosine min", "relative L2", "largest diff.", "neighbours", "outlier points",
]  # fmt: skip
GATES = ["compared with", "figure", "measured", "bar", ""]
RATES = ["", "norm-outlier rate", "largest / median", "shift incoherence", "note"]


def show_check(report: CheckReport, result: Result) -> None:
    """Print every comparison, gate and artifact rate of a check."""
    title = f"Parity of {report.bundle} on {report.backend} ({report.precision})"
    result.table(title, PARITY, [_parity_row(comparison) for comparison in report.comparisons])
    gates = [
        [reference, gate.name, figure(gate.figure), figure(gate.bar), "passed" if gate.passed else "MISSED"]
        for reference, of_reference in report.gates.items()
        for gate in of_reference
    ]
    result.table("Gates", GATES, gates)
    fidelity = report.quantised_fidelity
    if fidelity:
        result.say(
            f"The exam holds the answers of the {report.precision.upper()} graph in ONNX Runtime, not "
            f"those of FP32. Agreement with FP32 when it was calibrated: patch cosine {fidelity['cosine_mean']:.5f}, "
            f"1st percentile {fidelity['cosine_p1']:.5f}."
        )
    if report.artifacts:
        rows = [row for name, rates in report.artifacts.items() for row in _rates_rows(name, rates)]
        result.table(f"Artifacts on {report.images} images", RATES, rows)


def passed_sentence(report: CheckReport) -> str:
    """Say that all gates passed, and which the bundle missed when it was calibrated."""
    missed = "; ".join(report.missed_when_calibrated)
    return f"All gates passed{'; when it was calibrated the bundle itself missed: ' if missed else ''}{missed}."


def _parity_row(comparison: Comparison) -> list[str]:
    parity = comparison.parity
    return [
        comparison.reference,
        comparison.size,
        figure(parity.cosine_p1, ".8f"),
        figure(parity.cosine_min, ".8f"),
        figure(parity.relative_l2, ".1e"),
        figure(parity.largest_difference, ".1e"),
        percent(parity.neighbours),
        f"{parity.outlier_points:.4f}",
    ]


def _rates_rows(name: str, rates: ArtifactRates) -> list[list[str | float]]:
    outliers = rates.norm_outliers
    layers: list[list[str | float]] = [
        [f"{name}, layer {b}", percent(o.rate), o.largest, "", rates.note] for b, o in rates.layers.items()
    ]
    return [[name, percent(outliers.rate), outliers.largest, percent(rates.incoherent), rates.note], *layers]
