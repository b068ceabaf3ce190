"""``attach``: fold heads into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.commands.export import examine
from phreg_deploy.cli.console import Result
from phreg_deploy.cli.heads import head_options, read_heads
from phreg_deploy.cli.options import force_option, output_options
from phreg_deploy.cli.tables.export import show_bundle
from phreg_deploy.errors import GateFailed, PhregError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write.")
@head_options
@force_option
@output_options
def attach(
    bundle: Path,
    heads: tuple[str, ...],
    classes: tuple[str, ...],
    scale: float | None,
    background: float | None,
    output: Path,
    upsample: str | None,
    stride: int,
    labels: bool,
    only_head: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write BUNDLE with heads in its graph: it serves label maps, logits or depth beside the features or alone.

    The heads compute in float32, whatever the bundle's precision. `calibrate` takes the written bundle too, and then
    judges 8 bits by the heads' answers as well. The written bundle is examined as after `export`. --classes
    needs a CLIP or SigLIP that was exported with --project. With --only-head and no head, the features are taken out
    of a BUNDLE that has heads; calibrate before.

    \b
    Examples:
      phreg-deploy attach student-int8.bundle --head street-head -o street.bundle --upsample joint-bilateral --stride 4
      phreg-deploy attach student.bundle --head street=street-head --head far=depth-head -o both.bundle
      phreg-deploy attach student-int8.bundle --head street-head -o labels.bundle --labels --only-head
      phreg-deploy attach clip.bundle --classes classes.npz --background 0.1 -o labels.bundle --labels
    """
    from phreg_deploy.heads import attach as run

    result = Result(as_json, quiet)
    if not heads and not classes and not only_head:
        raise PhregError("attach: got no head, expected --head HEAD or --classes FILE.")
    named = read_heads(heads, classes, scale, background)
    how: dict[str, Any] = {"upsample": upsample, "stride": stride, "labels": labels, "only_head": only_head}
    written = run(bundle, named, output, **how, force=force)
    show_bundle(written, result)
    checked = examine(output, result)
    document = {"output": output, "manifest": written.manifest.to_json(), "check": checked}
    if checked.get("missed"):
        raise GateFailed(f"parity: {output}: {'; '.join(checked['missed'])}.", document)
    result.json(document)
