"""``profile``: measure what a bundle takes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import Number, output_options, tuning_options
from phreg_deploy.cli.tables.profile import show_profile
from phreg_deploy.errors import GateFailed, PhregError
from phreg_deploy.spec import parse_size


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@tuning_options
@click.option("--batch", "batches", help="Batch sizes, e.g. 1,4,8; by default the bundle's best.")
@click.option("--image-size", help="For bundles with several sizes, e.g. 518 or 480x640.")
@click.option(
    "--frame", default="480x640", show_default=True, help="Frame that preprocessing is measured on, HEIGHTxWIDTH."
)
@click.option(
    "--seconds",
    default=5.0,
    show_default=True,
    type=Number(0.1),
    help="Seconds to measure each batch size, after the warm-up.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="File with an earlier --json report; exit code 3 when the median grew.",
)
@click.option("--streams", default="1,2,4", show_default=True, help="On a GPU: numbers of threads that call at once.")
@click.option("--fps", type=Number(0.1), help="On a GPU: feed images at this rate; jitter and missed deadlines.")
@click.option(
    "--without", type=click.Path(path_type=Path), help="On a GPU: the same model without registers, for what they cost."
)
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    type=click.Choice(["single-stream", "offline"]),
    help="Also run this scenario as MLPerf Inference defines it, for --seconds; its rules want 600.",
)
@click.option(
    "--tolerance",
    default=0.1,
    show_default=True,
    type=Number(0),
    help="Growth allowed over the baseline; 0.1 is 10 %.",
)
@click.option(
    "--allow-other-conditions",
    is_flag=True,
    help="Compare with a baseline of another processor, GPU, driver, clocks, graph, backend, version or thread count.",
)
@output_options
def profile(
    bundle: Path,
    batches: str | None,
    image_size: str | None,
    frame: str,
    streams: str,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure a BUNDLE's latency: the graph alone, the extractor around it, and preprocessing; interleaved.

    On a GPU also the parts that trtexec reports (h2d, enqueue, compute, d2h) with and without CUDA graph; streams;
    layers by block; memory, power, energy per frame, clocks and throttling; a roofline against measured peaks.

    \b
    Examples:
      phreg-deploy profile student.bundle --threads 2 --frame 1080x1920
      phreg-deploy profile student.bundle --batch 1,8 --json > today.json
      phreg-deploy profile student.bundle --batch 1,8 --baseline today.json
      phreg-deploy profile student.bundle --backend tensorrt --fps 30 --without base.bundle
      phreg-deploy profile student.bundle --scenario single-stream --scenario offline --seconds 600
    """
    from phreg_deploy.profiling import profile as profile_bundle

    result = Result(as_json, quiet)
    report = profile_bundle(
        bundle,
        batches=_numbers(batches, "batch") if batches else None,
        streams=_numbers(streams, "streams"),
        image_size=parse_size(image_size) if image_size else None,
        frame=parse_size(frame),
        progress=result.progress,
        **options,
    )
    result.chosen(report.conditions.choice, options["backend"])
    show_profile(report, str(bundle), str(options["without"]), result)
    if report.slower:
        raise GateFailed(f"profile: {'; '.join(report.slower)}.", report.to_json())
    result.json(report.to_json())


def _numbers(text: str, name: str) -> list[int]:
    if not all(part.strip().isascii() and part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise PhregError(f"{name}: got {text!r}, expected numbers above 0, e.g. 1,4,8.")
    return [int(part) for part in text.split(",")]
