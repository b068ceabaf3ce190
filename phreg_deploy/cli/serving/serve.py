"""``serve``: serve bundles over HTTP on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import Number, output_options, public_key_option, tuning_options
from phreg_deploy.extras import require

if TYPE_CHECKING:
    from phreg_deploy.runtime.features import FeatureExtractor

SERVE = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@tuning_options
@public_key_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 serves other machines and needs a token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File with the token that clients send; by default the variable PHREG_SERVE_TOKEN.",
)
@click.option("--open", "open_", is_flag=True, help="Serve other machines without a token.")
@click.option("--max-batch", type=click.IntRange(1), help="Images in one run; by default the bundle's best batch.")
@click.option("--max-wait", type=Number(0), default=2.0, show_default=True, help="Milliseconds to wait for a batch.")
@click.option(
    "--queue", type=click.IntRange(0), default=32, show_default=True, help="Images that may wait, per bundle."
)
@click.option("--timeout", type=Number(0.001), default=30.0, show_default=True, help="Seconds for a request at most.")
@click.option("--max-mib", type=Number(0.001), default=20.0, show_default=True, help="MiB of a request at most.")
@click.option(
    "--max-megapixels", type=Number(0.001), default=50.0, show_default=True, help="Megapixels of an image at most."
)
@click.option("--drain", type=Number(0), default=0.0, show_default=True, help="Seconds to answer 503 before the end.")
@click.option("--reuse-port", is_flag=True, help="Share the port with other processes, as for a restart without a gap.")
@click.option("--access-log", is_flag=True, help="Write a line per request to stderr.")
@output_options
def serve(
    bundles: tuple[str, ...],
    backend: str,
    host: str,
    port: int,
    token_file: Path | None,
    open_: bool,
    max_batch: int | None,
    max_wait: float,
    queue: int,
    timeout: float,
    max_mib: float,
    max_megapixels: float,
    drain: float,
    reuse_port: bool,
    access_log: bool,
    as_json: bool,
    quiet: bool,
    **tuning: Any,
) -> None:
    """Serve each BUNDLE (PATH or NAME=PATH) over HTTP: images in; features, labels, overlays, artifact rates out.

    Requests are batched, bounded in size and time, and counted for Prometheus. SIGTERM and Ctrl-C end it after the
    requests that it accepted, with exit code 0. The address /docs describes every route.

    \b
    Examples:
      phreg-deploy serve student.bundle
      phreg-deploy serve labels.bundle --host 0.0.0.0 --token-file token --max-batch 8
      phreg-deploy serve day=day.bundle night=night.bundle --backend onnxruntime-cpu --threads 2
    """
    require("`phreg-deploy serve`", serve=SERVE)
    from phreg_deploy.serving.limits import ServiceLimits
    from phreg_deploy.serving.models import name_bundles
    from phreg_deploy.serving.requests.access import read_token
    from phreg_deploy.serving.server import Address
    from phreg_deploy.serving.server import serve as serve_bundles

    result = Result(as_json, quiet)
    limits = ServiceLimits(
        mib=max_mib,
        megapixels=max_megapixels,
        queue=queue,
        seconds=timeout,
        batch=max_batch,
        wait=max_wait / 1e3,
        drain=drain,
        stop=timeout,
    )

    def show(url: str, extractors: dict[str, FeatureExtractor]) -> None:
        for name, extractor in extractors.items():
            result.chosen(f"of {name}: {extractor.choice}", backend)
        result.say(f"Serving {', '.join(extractors)} at {url}; its routes are at {url}/docs. Ctrl-C ends it.")

    report = serve_bundles(
        name_bundles(bundles),
        backend=backend,
        address=Address(host, port, reuse_port, open_),
        limits=limits,
        token=read_token(token_file),
        access_log=access_log,
        show=show,
        **tuning,
    )
    answers = ", ".join(f"{count} with {status}" for status, count in report.answers.items()) or "none"
    result.say(f"Stopped after {report.seconds:.1f} s. Answers: {answers}. Unfinished: {report.unfinished}.")
    result.json(report.to_json())
