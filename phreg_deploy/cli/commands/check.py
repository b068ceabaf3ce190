"""``check``: parity and artifact rates of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.exploring.options import compared_options
from phreg_deploy.cli.options import images_option, output_options, public_key_option, tuning_options, verify_first
from phreg_deploy.cli.tables.check import passed_sentence, show_check
from phreg_deploy.errors import GateFailed

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@compared_options
@images_option(False, "Folder of images to compare and to take artifact rates on.")
@click.option("--limit", default=64, show_default=True, type=click.IntRange(1), help="Images at most.")
@tuning_options
@public_key_option
@click.option("--report", "page", type=click.Path(path_type=Path), help="Write an HTML page, as of `explore`.")
@click.option(
    "--bisect", is_flag=True, help="Find the first block that diverges from FP32; needs onnx and onnxruntime."
)
@output_options
def check(
    bundle: Path,
    backend: str,
    threads: int | None,
    compute: str,
    mode: str,
    device: int,
    public_key: Path | None,
    bisect: bool,
    page: Path | None,
    as_json: bool,
    quiet: bool,
    **arguments: Any,
) -> None:
    """Check a BUNDLE: parity with PyTorch and artifact rates. Exit code 3 when a gate is missed.

    Without --reference no PyTorch is needed: the bundle carries its own exam.

    \b
    Examples:
      phreg-deploy check student.bundle
      phreg-deploy check student.bundle --reference student --images photos/ --report report.html
    """
    from phreg_deploy.cli.commands.build import show_bisection, tried_bisection
    from phreg_deploy.runtime.backends.options import BackendOptions
    from phreg_deploy.verify import check as check_bundle

    verify_first(bundle, public_key)
    result, options = Result(as_json, quiet), BackendOptions(threads, compute, mode, device)
    arguments |= {"backend": backend, "options": options, "progress": result.progress}
    if page is None:
        report = check_bundle(bundle, **arguments)
    else:
        from phreg_deploy.explorer import explore

        report = explore([bundle], output=page, verb="check", **arguments).bundles[0].check
    result.chosen(report.choice, backend)
    show_check(report, result)
    if page is not None:
        result.say(f"Wrote {page}.")
    document = report.to_json()
    if bisect:
        # A bisection that fails must not hide the missed gate.
        find = tried_bisection if report.missed else show_bisection
        document["bisection"] = find(bundle, report.backend, options, result)
    if report.missed:
        raise GateFailed(f"check: {bundle}: {'; '.join(report.missed)}.", document)
    result.json(document)
    result.say(passed_sentence(report))
