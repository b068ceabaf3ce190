"""``calibrate``: write a bundle in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import force_option, images_option, output_options
from phreg_deploy.cli.tables.calibrate import show_calibration


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@images_option(True, "Folder of photographs like those of the deployment; at least 8, at most 352 are used.")
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
@click.option(
    "--cosine",
    "cosine_p1",
    type=float,
    help="The bar on the 1st-percentile patch cosine with FP32; by default 0.99.",
)
@force_option
@output_options
def calibrate(output: Path, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Calibrate an FP32 BUNDLE to INT8 or FP8. If its features miss the bar, nothing is written and the exit code is 3.

    Needs no PyTorch. The bar is on dense features of images that took part in no choice. With --force, a bundle that
    misses the bar is written too, and its manifest says so.

    \b
    Examples:
      phreg-deploy calibrate student.bundle --images photos/ -o student-int8.bundle
      phreg-deploy calibrate student.bundle --images photos/ -o student-int8.bundle --float-macs 0 --cosine 0.98
    """
    from phreg_deploy.calibration import calibrate as run

    result = Result(as_json, quiet)
    report = run(output=output, progress=result.progress, **settings)
    show_calibration(report, result)
    result.json({"output": output, **report.to_json()})
