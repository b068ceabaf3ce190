"""The command ``probe``: train a linear head and keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import checkpoint_option, force_option, output_options
from phreg_deploy.cli.probing.options import data_options
from phreg_deploy.cli.probing.tables import show_evaluation


@click.command()
@click.argument("what")
@checkpoint_option
@data_options
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the head to write.")
@force_option
@output_options
def probe(
    what: str,
    checkpoint: Path | None,
    output: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Train a linear head on the dense features of WHAT (a timm name, student or bundle), and write it.

    It is the first training of `evaluate`, and its figures are printed. The head is a folder of head.safetensors and
    head.json, the format of docs/heads.md.

    \b
    Examples:
      phreg-deploy probe student.bundle --images photos/ --masks masks/ --classes names.txt -o head
      phreg-deploy probe student --images photos/ --depth depth/ -o depth-head
    """
    from phreg_deploy.evaluation import EvaluationRequest
    from phreg_deploy.evaluation import probe as run

    result = Result(as_json, quiet)
    checkpoints = () if checkpoint is None else (checkpoint,)
    request = EvaluationRequest(what=(what,), checkpoints=checkpoints, seeds=1, **settings)
    head, evaluation = run(request, output, force=force, progress=result.progress)
    show_evaluation(evaluation, result)
    result.say(f"Wrote {output}: {len(head.weight)} outputs of {head.width} channels.")
    result.json({"head": output, "width": head.width, "outputs": len(head.weight), **evaluation.to_json()})
