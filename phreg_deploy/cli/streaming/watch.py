"""``watch``: serve a video or camera, and show what it costs and whether it keeps up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import refuse_url
from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import Number, force_option, output_options, public_key_option, tuning_options
from phreg_deploy.cli.streaming.display import Display, show_report


@click.command()
@click.argument("source")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--also", multiple=True, help="One more source; sources take turns. Repeatable.")
@tuning_options
@public_key_option
@click.option("--image-size", help="For bundles with several sizes, e.g. 518 or 480x640.")
@click.option(
    "--fit",
    type=click.Choice(["pad", "crop", "squash"]),
    help="Keep the aspect by padding or cropping, or squash; by default as the bundle says.",
)
@click.option("--every-frame", is_flag=True, help="Serve every frame of a file, however long it takes; drop none.")
@click.option("--fps", type=Number(0.001), help="Pace files at this rate; by default at their own.")
@click.option("--frames", type=click.IntRange(1), help="End after so many frames.")
@click.option("--deadline", type=Number(0.001), help="Milliseconds from the capture of a frame to its features.")
@click.option(
    "--max-late", type=Number(0, 1), default=0.1, show_default=True, help="Share of frames that may miss the deadline."
)
@click.option("--max-artifact-rate", type=Number(0, 1), help="Mean share of artifact tokens that raises an alarm.")
@click.option(
    "--no-frame",
    type=Number(0.001),
    default=5.0,
    show_default=True,
    help="Seconds without a frame that raise an alarm.",
)
@click.option(
    "--slow-run",
    type=Number(0.001),
    default=10.0,
    show_default=True,
    help="Seconds of one run of the graph that raise an alarm.",
)
@click.option("--fallback", help="Backend that takes over when the first fails, e.g. onnxruntime-cpu.")
@click.option(
    "--write",
    type=click.Path(path_type=Path),
    help="Write an MP4 of each image, its token norms and its features; takes time from serving.",
)
@force_option
@output_options
def watch(
    source: str,
    bundle: Path,
    also: tuple[str, ...],
    backend: str,
    image_size: str | None,
    deadline: float | None,
    max_late: float,
    max_artifact_rate: float | None,
    no_frame: float,
    slow_run: float,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve SOURCE with BUNDLE until it ends or Ctrl-C: frames per second, latency, drops, artifact rate, alarms.

    SOURCE is a video file, a folder of photographs, a camera's number, or an address such as rtsp://camera/stream.
    Files are paced at their own rate, and the newest frame is served, as with a camera.

    \b
    Examples:
      phreg-deploy watch drive.mp4 student.bundle --deadline 50
      phreg-deploy watch 0 student.bundle --also 1 --fallback onnxruntime-cpu
      phreg-deploy watch drive.mp4 student.bundle --every-frame --frames 100 --write overlay.mp4
    """
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.spec import parse_size
    from phreg_deploy.stream.limits import Limits
    from phreg_deploy.stream.sources.addresses import public_name
    from phreg_deploy.stream.watching import check_video
    from phreg_deploy.stream.watching import watch as watch_stream

    refuse_url(str(bundle))
    result, size = Result(as_json, quiet), parse_size(image_size) if image_size else None
    seconds = None if deadline is None else deadline / 1e3
    limits = Limits(seconds, max_late, max_artifact_rate, no_frame, slow_run)
    check_video(options["write"], options["force"])
    tuning = {name: options.pop(name) for name in ("threads", "compute", "mode", "device", "public_key")}
    sources = {public_name(place): place for place in (source, *also)}
    with FeatureExtractor.load(bundle, backend, **tuning) as extractor:
        result.chosen(extractor.choice, backend)
        with Display(result, deadline is not None) as display:
            calls: dict[str, Any] = {"show": display.update, "on_alarm": display.alarm}
            report = watch_stream(extractor, sources, size=size, limits=limits, **calls, **options)
    show_report(report, result, deadline is not None)
    result.json(report.to_json())
