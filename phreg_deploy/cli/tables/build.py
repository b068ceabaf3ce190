"""Tables of ``build`` and of bisection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phreg_deploy.cli.console import Result

if TYPE_CHECKING:
    from phreg_deploy.export.engine.report import BuildReport
    from phreg_deploy.verify.bisection import BisectionReport


def show_build(report: BuildReport, bundle: str, result: Result) -> None:
    """Print what was built, what it lacks, and the next command."""
    from phreg_deploy.runtime.parity import agreement

    key, census, parity = report.key, report.census, report.verdict.get("parity")
    result.table(
        f"Engine for {key.gpu} (SM {key.architecture / 10:.1f}), TensorRT {key.tensorrt}",
        ["", ""],
        [
            ["fused attention", f"{len(census.fused_attention) + census.unnamed_fused} blocks"],
            ["linear layers in 8 bits / in float", f"{len(census.eight_bit)} / {len(census.float_linear)}"],
            ["layers", census.layers],
            ["plan", f"{report.megabytes:.1f} MB, built in {report.seconds:.0f} s"],
            ["parity", "not checked" if parity is None else agreement(parity)],
        ],
    )
    for line in [*report.shortfalls, *report.missed]:
        result.say(f"Missed: {line}.")
    for line in report.doubts:
        result.say(f"Cannot tell: {line}.")
    verb = "It was there already" if report.cached else "Wrote"
    result.say(f"{verb}: {report.plan}. Next: phreg-deploy profile {bundle} --backend tensorrt")


def show_steps(report: BisectionReport, title: str, result: Result) -> None:
    """Print a bisection: how far the answers differ after each half-block, and what to keep in FP32."""
    result.table(
        title,
        ["after", "cosine p1", "relative L2", "not finite", "largest in FP32"],
        [
            [step.place, f"{step.cosine_p1:.8f}", f"{step.relative_l2:.1e}", step.bad_values, step.largest]
            for step in report.steps
        ],
    )
    if report.first is None:
        result.say("No half-block diverges beyond the gate.")
    else:
        result.say(
            f"The first that diverges is {report.first}. Keep it in FP32: export or calibrate again with "
            f"{report.proposal}"
        )
