"""Options of ``attach`` and ``export`` for heads, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from phreg_deploy.errors import PhregError

UPSAMPLING = ("bilinear", "joint-bilateral")


def head_options(required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--head``, ``--upsample``, ``--stride`` and ``--labels``."""
    options = (
        click.option(
            "--head",
            "heads",
            multiple=True,
            required=required,
            metavar="[NAME=]HEAD",
            help="A head of `probe`, or a linear layer or 1x1 convolution of another program, to serve beside the "
            "features. Repeatable; with several, a NAME each, e.g. street=head.",
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
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


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


def check_head_options(heads: tuple[str, ...], upsample: str | None, stride: int, labels: bool) -> None:
    """Read the heads before slow work. Raises ``PhregError`` for heads or options that do not fit."""
    from phreg_deploy.bundle.heads import check_upsampling
    from phreg_deploy.heads import Head

    check_upsampling(upsample, stride)
    for name, given in (("upsample", upsample), ("labels", labels)):
        if given and not heads:
            raise PhregError(f"{name}: got --{name} without a head; expected both: --head HEAD --{name}.")
    for path in named_heads(heads).values():
        Head.read(path)
