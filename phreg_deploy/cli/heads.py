"""Options of ``attach`` and ``export`` for heads, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phreg_deploy.cli.options import Finite
from phreg_deploy.errors import PhregError

if TYPE_CHECKING:
    from phreg_deploy.heads import TextHead

UPSAMPLING = ("bilinear", "joint-bilateral")
# The names of the parameters that name heads.
SOURCES = ("heads", "classes", "scale", "background")


def head_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--head``, ``--classes``, and the options that say how heads are served."""
    options = (
        click.option(
            "--head",
            "heads",
            multiple=True,
            metavar="[NAME=]HEAD",
            help="A head of `probe`, or a linear layer or 1x1 convolution of another program, to serve beside the "
            "features. Repeatable; with several, a NAME each, e.g. street=head.",
        ),
        click.option(
            "--classes",
            multiple=True,
            metavar="[NAME=]FILE",
            help="Text embeddings of class names, written by `classes`, to serve as a head. Repeatable, as --head.",
        ),
        click.option(
            "--scale", type=Finite(), help="With --classes: factor of the cosines; by default the model's own."
        ),
        click.option(
            "--background",
            type=Finite(),
            metavar="P",
            help="With --classes: a place where no class has this probability is class 0, background; by default there "
            "is none.",
        ),
        click.option(
            "--upsample",
            is_flag=False,
            flag_value=UPSAMPLING[0],
            type=click.Choice(UPSAMPLING),
            help="Enlarge the heads' answers, bilinearly unless told otherwise; joint-bilateral follows the image's "
            "colours. By default there is one answer per patch.",
        ),
        click.option("--stride", type=int, default=1, show_default=True, help="With --upsample: pixels per answer."),
        click.option("--labels", is_flag=True, help="Serve the class of each place, uint8, in place of the logits."),
        click.option(
            "--only-head",
            is_flag=True,
            help="Serve the answers of all heads and the token norms, and no features: far less to copy.",
        ),
    )

    for option in reversed(options):
        command = option(command)
    return command


def named_heads(heads: tuple[str, ...]) -> dict[str, str | Path]:
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


def read_heads(
    heads: tuple[str, ...], classes: tuple[str, ...], scale: float | None, background: float | None
) -> dict[str, str | Path | TextHead]:
    """Read ``--head`` as paths, and ``--classes`` as heads, by their names.

    Raises:
        PhregError: a name that is there twice, a damaged file, or a scale or threshold that does not fit.
    """
    from phreg_deploy.heads import ClassEmbeddings

    if not classes and (scale is not None or background is not None):
        raise PhregError("attach: --scale and --background go with --classes.")
    linear, texts = named_heads(heads), named_heads(classes)
    both = sorted(set(linear) & set(texts))
    if both:
        raise PhregError(f"attach: got two heads named {both[0]!r}; give each a name of its own: --classes NAME=FILE.")
    return {**linear, **{name: ClassEmbeddings.read(path).head(scale, background) for name, path in texts.items()}}


def check_head_options(
    heads: tuple[str, ...],
    classes: tuple[str, ...],
    scale: float | None,
    background: float | None,
    upsample: str | None,
    stride: int,
    labels: bool,
    only_head: bool,
) -> None:
    """Read the heads before slow work. Raises ``PhregError`` for heads or options that do not fit."""
    from phreg_deploy.bundle.heads import check_upsampling
    from phreg_deploy.heads import Head

    check_upsampling(upsample, stride)
    for name, given in (("upsample", upsample), ("labels", labels), ("only-head", only_head)):
        if given and not heads and not classes:
            raise PhregError(f"{name}: got --{name} without a head; expected both: --head HEAD --{name}.")
    for head in read_heads(heads, classes, scale, background).values():
        if isinstance(head, (str, Path)):
            Head.read(head)
