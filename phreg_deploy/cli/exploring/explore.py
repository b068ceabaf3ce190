"""``explore``: bundles, their student and base on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.exploring.options import compared_options
from phreg_deploy.cli.options import images_option, output_options, tuning_options
from phreg_deploy.cli.tables.check import show_check
from phreg_deploy.errors import GateFailed


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@compared_options
@images_option(True, "Folder of images to measure on and to show.")
@click.option("--limit", default=12, show_default=True, type=click.IntRange(1), help="Images to measure at most.")
@click.option("--pictures", default=12, show_default=True, type=click.IntRange(1), help="Images to show: the worst.")
@click.option("--latency", type=click.FloatRange(0.1), help="Also measure latency, for so many seconds a bundle.")
@tuning_options
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The HTML page to write.")
@output_options
def explore(
    bundles: tuple[Path, ...],
    backend: str,
    threads: int | None,
    compute: str,
    mode: str,
    device: int,
    output: Path,
    as_json: bool,
    quiet: bool,
    **arguments: Any,
) -> None:
    """Write BUNDLES on one HTML page without network: click a patch, and see what each model finds similar to it.

    Gates, parity by image, token norms by block, sensitivities of layers, digests and commands are on it too. Without
    --reference and --base no PyTorch is needed. Exit code 3 when a gate is missed; the page is written all the same.

    \b
    Examples:
      phreg-deploy explore student.bundle --images photos/ -o explore.html
      phreg-deploy explore student.bundle student-int8.bundle --reference student --images photos/ -o explore.html
    """
    from phreg_deploy.explorer import explore as run
    from phreg_deploy.runtime.backends.options import BackendOptions

    result, options = Result(as_json, quiet), BackendOptions(threads, compute, mode, device)
    explored = run(bundles, output=output, backend=backend, options=options, progress=result.progress, **arguments)
    for bundle in explored.bundles:
        result.chosen(bundle.check.choice, backend)
        show_check(bundle.check, result)
    result.say(f"Wrote {output}, {output.stat().st_size / 1e6:.2f} MB.")
    if explored.missed:
        raise GateFailed(f"explore: {'; '.join(explored.missed)}.", explored.to_json())
    result.json(explored.to_json())
