"""``attach``: fold heads into a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from phreg_deploy.cli.commands.export import examine
from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import force_option, output_options
from phreg_deploy.cli.tables.export import show_bundle
from phreg_deploy.errors import GateFailed, PhregError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--head",
    "heads",
    multiple=True,
    required=True,
    metavar="[NAME=]HEAD",
    help="A head of `probe`, or a linear layer or 1x1 convolution of another program. Repeatable; with several, a NAME "
    "each, e.g. street=head.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write.")
@click.option(
    "--upsample",
    is_flag=False,
    flag_value="bilinear",
    type=click.Choice(["bilinear", "joint-bilateral"]),
    help="Enlarge the answers, bilinearly unless told otherwise; joint-bilateral follows the image's colours. By "
    "default there is one answer per patch.",
)
@click.option("--stride", type=int, default=1, show_default=True, help="With --upsample: pixels per answer.")
@click.option("--labels", is_flag=True, help="Serve the class of each place, uint8, in place of the logits.")
@force_option
@output_options
def attach(
    bundle: Path,
    heads: tuple[str, ...],
    output: Path,
    upsample: str | None,
    stride: int,
    labels: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write BUNDLE with heads in its graph: it serves label maps, logits or depth beside the features.

    The heads compute in float32 on the bundle's features, so attach them after `calibrate`. The written bundle is
    examined as after `export`.

    \b
    Examples:
      phreg-deploy attach student-int8.bundle --head street-head -o street.bundle --upsample joint-bilateral --stride 4
      phreg-deploy attach student.bundle --head street=street-head --head far=depth-head -o both.bundle
    """
    from phreg_deploy.heads import attach as run

    result = Result(as_json, quiet)
    written = run(bundle, _named(heads), output, upsample=upsample, stride=stride, labels=labels, force=force)
    show_bundle(written, result)
    checked = examine(output, result)
    document = {"output": output, "manifest": written.manifest.to_json(), "check": checked}
    if checked.get("missed"):
        raise GateFailed(f"parity: {output}: {'; '.join(checked['missed'])}.", document)
    result.json(document)


def _named(heads: tuple[str, ...]) -> dict[str, str | Path]:
    """Read ``NAME=HEAD`` or ``HEAD``. Raises ``PhregError`` for a name that is there twice."""
    named: dict[str, str | Path] = {}
    for text in heads:
        name, separator, path = text.partition("=")
        if not separator:
            name, path = "", text
        if name in named:
            raise PhregError(f"attach: got two heads named {name!r}; give each a name of its own: --head NAME=HEAD.")
        named[name] = Path(path)
    return named
