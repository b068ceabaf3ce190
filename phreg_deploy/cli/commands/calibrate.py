"""``calibrate``: a bundle in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phreg_deploy.arguments import check_cosine
from phreg_deploy.cli.console import Result, figure, percent
from phreg_deploy.cli.options import force_option, images_option, output_options
from phreg_deploy.extras import CALIBRATION, require
from phreg_deploy.files.atomic import check_target
from phreg_deploy.images.photographs import list_images

if TYPE_CHECKING:
    from phreg_deploy.calibration.calibrator import CalibrationRequest

SHOWN = 8  # layers in the table; calibration.json lists all


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@images_option(True, "Folder of photographs like those of the deployment; 352 are used at most, 8 at least.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write.")
@click.option(
    "--mode", default="int8", show_default=True, help="int8, or fp8 (TensorRT on Ada, Hopper, Blackwell, Thor)."
)
@click.option(
    "--target",
    help="cpu (ONNX Runtime, OpenVINO), or trt: no zero points, the rest in FP16. By default cpu, and trt for fp8.",
)
@click.option(
    "--float-macs",
    default=0.1,
    show_default=True,
    help="Share of the linear layers' arithmetic that may stay in float until the bar is passed; 0 for none.",
)
@click.option(
    "--keep-fp32",
    "keep",
    multiple=True,
    metavar="REGEX",
    help="With --target trt: nodes around the 8 bits that stay in FP32. Repeatable.",
)
@click.option("--cosine", type=float, help="The bar on the 1st-percentile patch cosine with FP32; by default 0.99.")
@force_option
@output_options
def calibrate(
    bundle: Path,
    images: Path,
    output: Path,
    mode: str,
    target: str | None,
    keep: tuple[str, ...],
    float_macs: float,
    cosine: float | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Calibrate an FP32 BUNDLE to INT8 or FP8. Exit code 3, and nothing written, when its features miss the bar.

    Needs no PyTorch. The bar is on dense features of images that took part in no choice. --force writes a bundle that
    misses it anyway, and its manifest says so.

    \b
    Examples:
      phreg-deploy calibrate student.bundle --images photos/ -o student-int8.bundle
      phreg-deploy calibrate student.bundle --images photos/ -o student-int8.bundle --float-macs 0 --cosine 0.98
    """
    result = Result(as_json, quiet)
    check_cosine(cosine)
    list_images(images)
    check_target(output, force, [bundle, images])
    require("`phreg-deploy calibrate`", calibration=CALIBRATION)
    from phreg_deploy.calibration.calibrator import CalibrationRequest

    target = target or ("trt" if mode == "fp8" else "cpu")
    request = CalibrationRequest(
        bundle, images, mode=mode, target=target, keep=keep, float_macs=float_macs, cosine_p1=cosine
    )
    report = run_calibration(request, output, force, result)
    result.json({"output": output, **report})


def run_calibration(request: CalibrationRequest, output: Path, force: bool, result: Result) -> dict[str, Any]:
    """Calibrate and print; what ``calibrate`` and ``export --precision int8`` share."""
    from phreg_deploy.calibration.calibrator import calibrate as run

    report = run(request, output, force=force, progress=result.progress)
    found, bar = report["fidelity"], report["bar"]
    result.table(
        f"{request.mode.upper()} against FP32 on {report['images']['report']['count']} images that took part in no choice",
        ["", request.mode.upper(), "bar"],
        [
            ["patch cosine, mean", found["cosine_mean"], ""],
            ["    1st percentile", found["cosine_p1"], f"at least {bar['cosine_p1']}"],
            ["nearest-neighbour agreement", found["neighbours"], f"at least {bar['neighbours']}"],
            ["norm-outlier rate, change in points", found["outlier_points"], f"at most {bar['outlier_points']}"],
            ["class token cosine, smallest", found["cls_cosine"], ""],
            ["linear layers in 8 bits", report["integer_layers"], f"of {len(report['layers'])}"],
            ["linear MACs left in float", percent(report["float_macs"]), ""],
        ],
    )
    worst = sorted(report["layers"], key=lambda layer: -layer["sensitivity"]["mean"])[:SHOWN]
    result.table(
        "Most sensitive layers: what 1 - cosine loses when each alone goes back to float",
        ["layer", "mean", "1st percentile", "share of MACs", "runs in"],
        [
            [n["name"], n["sensitivity"]["mean"], n["sensitivity"]["p1"], percent(n["macs"]), n["precision"]]
            for n in worst
        ],
    )
    for line in report["missed"]:
        result.say(f"Missed: {line}. The manifest says so.")
    used = report["smoothing"]
    result.say(
        f"Wrote {output} in {report['seconds']:.0f} s; smoothing: layer norms {figure(used['norm'])}, values {figure(used['value'])}, "
        f"hidden units {figure(used['hidden'])}. Next: phreg-deploy check {output}"
    )
    return report
