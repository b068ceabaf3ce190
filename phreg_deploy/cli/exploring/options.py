"""Options of ``check`` and ``explore``: the models, their checkpoints and the gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.options import Finite

_PATH = click.Path(path_type=Path)


def compared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the models to compare with, and of the gates."""
    options = (
        click.option("--reference", help="The PyTorch student (or timm name) to compare with on --images."),
        click.option("--reference-checkpoint", type=_PATH, help="Weights for a timm name given as --reference."),
        click.option("--base", help="The base model, for its artifact rate beside the others."),
        click.option("--base-checkpoint", type=_PATH, help="Weights for a timm name given as --base."),
        click.option(
            "--cosine", type=Finite(), help="Gate on the 1st-percentile patch cosine; by default the precision's."
        ),
        click.option(
            "--outlier-points", type=Finite(), help="Gate on the change of the norm-outlier rate, percentage points."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
