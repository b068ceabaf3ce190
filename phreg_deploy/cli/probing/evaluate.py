"""The command ``evaluate``: mean IoU or depth errors of linear probes, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import Finite, force_option, output_options
from phreg_deploy.cli.probing.options import data_options
from phreg_deploy.cli.probing.tables import show_evaluation


@click.command()
@click.argument("what", nargs=-1, required=True)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Weights for a timm name. Repeatable: one for each timm name, in their order.",
)
@click.option("--base", metavar="NAME", help="What the others are compared with; by default the first.")
@data_options
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of trainings, each on its own draw of patches.",
)
@click.option("--text", type=click.Path(path_type=Path), help="With ovss: class names embedded by `classes`.")
@click.option("--scale", type=Finite(), help="With ovss: factor of the cosines; by default 40, for SigLIP its own.")
@click.option(
    "--background", type=Finite(), metavar="P", help="With ovss: a pixel below this probability is background."
)
@click.option(
    "--short-side",
    type=click.IntRange(1),
    default=448,
    show_default=True,
    help="With ovss: short side of the images in pixels.",
)
@click.option(
    "--window", type=click.IntRange(1), default=336, show_default=True, help="With ovss: side of a window in pixels."
)
@click.option(
    "--stride", type=click.IntRange(1), default=112, show_default=True, help="With ovss: pixels between windows."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for evaluation.json and pictures.")
@force_option
@output_options
def evaluate(
    what: tuple[str, ...], output: Path | None, force: bool, as_json: bool, quiet: bool, **settings: Any
) -> None:
    """Train a linear probe on the dense features of each of WHAT (timm names, students, bundles), and test it.

    The features stay as they are. Figures come with 95 % intervals, and every model is compared with the first on the
    same images: better, worse, or not told apart. A name given twice is trained again with other seeds.

    --protocol ovss trains nothing: it segments by --text, as PH-Reg's paper does for CLIP, in windows.

    \b
    Examples:
      phreg-deploy evaluate vit_small_patch14_dinov2.lvd142m student --images photos/ --masks masks/
      phreg-deploy evaluate student student-int8.bundle --images photos/ --masks masks/ --classes names.txt -o report/
      phreg-deploy evaluate student.bundle --images photos/ --depth depth/ --depth-scale 0.001
      phreg-deploy evaluate clip clip.bundle --protocol ovss --text classes.npz --images photos/ --masks masks/
    """
    from phreg_deploy.evaluation import EvaluationRequest
    from phreg_deploy.evaluation import evaluate as run

    result = Result(as_json, quiet)
    request = EvaluationRequest(what=what, **settings)
    evaluation = run(request, output, force=force, progress=result.progress)
    show_evaluation(evaluation, result)
    if output is not None:
        result.say(f"Wrote {output}.")
    result.json(evaluation.to_json())
