"""``selftest``: check the backends of this machine, and write one archive to send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import device_number, force_option, output_options
from phreg_deploy.errors import GateFailed


@click.command()
@click.option("--gpu", is_flag=True, help="TensorRT on an NVIDIA GPU, instead of the backends of the processor.")
@device_number
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Check this bundle, not the own ones, whose export needs torch. May be given several times.",
)
@click.option("--quick", is_flag=True, help="No ViT-S, no compatibility modes, and 1,000 frames.")
@click.option("--frames", type=click.IntRange(1), help="To serve while memory is watched; 10,000 by default.")
@click.option(
    "-o", "--output", default="selftest.zip", show_default=True, type=click.Path(path_type=Path), help="The archive."
)
@force_option
@output_options
def selftest(as_json: bool, quiet: bool, **options: Any) -> None:
    """Check that every backend of this machine answers right, one line each, and write an archive to send.

    With --gpu it builds engines in each precision of the GPU, and examines each profile on each path: plain, captured,
    replayed, arrays on the GPU, misaligned frames. Then threads, memory, compute-sanitizer, and the cases that
    NVIDIA's documents contradict each other in. The archive holds no user name and no path.

    \b
    Examples:
      phreg-deploy selftest
      phreg-deploy selftest --gpu --quick
      phreg-deploy selftest --gpu --bundle student.bundle --bundle student-int8.bundle
    """
    from phreg_deploy.selftest import selftest as run_selftest

    result = Result(as_json, quiet)
    verdict = run_selftest(on_check=lambda check: result.say(str(check)), progress=result.progress, **options)
    result.say(f"{verdict}. {verdict.archive} holds the findings.")
    if not verdict.passed:
        said = "; ".join(f"{check.name}: {check.detail}" for check in verdict.failed[:3]) or "no check applies here"
        raise GateFailed(f"selftest: {verdict}: {said}. Send {verdict.archive}.", verdict.to_json())
    result.json(verdict.to_json())
