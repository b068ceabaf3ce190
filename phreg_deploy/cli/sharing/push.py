"""The command ``push``: upload a student or a bundle to the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import output_options


@click.command()
@click.argument("folder")
@click.argument("repository")
@click.option("--private", is_flag=True, help="Create the repository private.")
@click.option("--revision", metavar="BRANCH", help="Push to a branch, which is created if it is not there.")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Check the folder and list the files; nothing is uploaded.")
@output_options
def push(folder: str, repository: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Push FOLDER, a student or a bundle, to REPOSITORY (org/name) on the Hugging Face hub.

    hf-hub:org/name, or hf-hub:org/name@revision, then stands for it in every command, in FeatureExtractor.load and, for
    a student, in timm.create_model. The model card README.md is pushed too; one is written if there is none. Its
    picture, before-after.png, shows three photographs of yours: remove it first if they are not for others.

    \b
    Examples:
      phreg-deploy push student my-name/dino-registers --dry-run
      phreg-deploy push student.bundle my-name/dino-bundle --private
      phreg-deploy check hf-hub:my-name/dino-bundle
    """
    from phreg_deploy.sharing import push as run

    result = Result(as_json, quiet)
    pushed = run(folder, repository, progress=result.progress, **options)
    rows = [[name, f"{size / 1e3:,.1f} kB"] for name, size in pushed.files.items()]
    result.table(f"Files of the {pushed.kind} {folder}, for {pushed.repository}", ["file", "size"], rows)
    result.say(f"Pushed {pushed.url}." if pushed.url else "Nothing was uploaded.")
    result.json(pushed.to_json())
