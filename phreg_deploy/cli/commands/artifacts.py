"""The command ``artifacts``: score the artifacts of a model, a student or a bundle."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import check_file
from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import (
    Number,
    backend_option,
    checkpoint_option,
    device_option,
    images_option,
    output_options,
    readout_options,
)
from phreg_deploy.cli.tables.artifacts import show_artifacts
from phreg_deploy.files.atomic import write_atomic


@click.command()
@click.argument("model")
@images_option(True, "Folder of images to score on.")
@checkpoint_option
@click.option("--image-size", help="e.g. 518 or 480x640; by default the model's or the bundle's own.")
@click.option(
    "--limit",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Most images to read, in the order of their names.",
)
@click.option(
    "--median",
    type=Number(0, min_open=True),
    help="The base model's median norm; by default a student's or bundle's record, else the model's own.",
)
@click.option("--picture", type=click.Path(path_type=Path), help="Write a PNG of the first image's features and norms.")
@readout_options("the student's")
@device_option
@backend_option
@output_options
def artifacts(model: str, images: Path, picture: Path | None, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Score the artifacts in the dense features of MODEL: a timm name, a student's folder or a bundle.

    \b
    Examples:
      phreg-deploy artifacts vit_small_patch14_dinov2.lvd142m --images photos/ --picture before.png
      phreg-deploy artifacts student --images photos/
      phreg-deploy artifacts vit_base_patch16_clip_quickgelu_224.openai --images photos/ --readout value --project
      phreg-deploy artifacts student.bundle --images photos/
    """
    from phreg_deploy.verify import score_artifacts

    result = Result(as_json, quiet)
    if picture is not None:
        check_file(picture, "picture")
    report = score_artifacts(model, images, progress=result.progress, **settings)
    show_artifacts(report, result)
    if picture is not None:
        data = io.BytesIO()
        report.picture.save(data, format="PNG")
        write_atomic(picture, data.getvalue())
        result.say(f"Wrote {picture}.")
    result.json(report.to_json())
