"""``artifacts``: artifact scores of a model, a student or a bundle."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import check_file
from phreg_deploy.cli.console import Result, percent
from phreg_deploy.cli.options import (
    Number,
    backend_option,
    checkpoint_option,
    device_option,
    images_option,
    output_options,
)


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
    help="Images at most, in the order of their names.",
)
@click.option(
    "--median",
    type=Number(0, min_open=True),
    help="The base model's median norm; by default a student's or bundle's record, else the model's own.",
)
@click.option("--picture", type=click.Path(path_type=Path), help="Write a PNG of the first image's features and norms.")
@device_option
@backend_option
@output_options
def artifacts(model: str, images: Path, picture: Path | None, as_json: bool, quiet: bool, **asked: Any) -> None:
    """Score the artifacts in the dense features of MODEL: a timm name, a student's folder or a bundle.

    \b
    Examples:
      phreg-deploy artifacts vit_small_patch14_dinov2.lvd142m --images photos/ --picture before.png
      phreg-deploy artifacts student --images photos/
      phreg-deploy artifacts student.bundle --images photos/
    """
    from phreg_deploy.verify import score_artifacts

    result = Result(as_json, quiet)
    if picture is not None:
        check_file(picture, "picture")
    report = score_artifacts(model, images, progress=result.progress, **asked)
    document = report.to_json()
    outliers, shift = document["norm_outliers"], document["shift_incoherence"]
    rows = [
        ["norm-outlier rate", percent(outliers["rate"])],
        ["    high / low", f"{percent(outliers['upper'])} / {percent(outliers['lower'])}"],
        ["largest norm / median", outliers["largest"]],
        ["median norm measured against", outliers["median"]],
        ["shift incoherence", percent(shift["rate"])],
        [
            "    1 - cosine, percentiles 50 / 90 / 95 / 99",
            " / ".join(f"{shift[p]:.3f}" for p in ("p50", "p90", "p95", "p99")),
        ],
    ]
    result.table(f"Artifacts of {model} on {document['images']} images", ["score", "value"], rows)
    if document.get("blocks"):
        rows = [[str(i), b["median"], b["largest"], percent(b["rate"])] for i, b in enumerate(document["blocks"])]
        result.table(
            "Block by block, over patch tokens", ["block", "median norm", "largest / median", "above 2x"], rows
        )
    if picture is not None:
        from phreg_deploy.files.atomic import write_atomic

        data = io.BytesIO()
        report.picture.save(data, format="PNG")
        write_atomic(picture, data.getvalue())
        result.say(f"Wrote {picture}.")
    result.json(document)
