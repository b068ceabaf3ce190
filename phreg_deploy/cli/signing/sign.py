"""The command ``sign``: sign a student or a bundle."""

from __future__ import annotations

import os
from pathlib import Path

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import force_option, output_options


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private key, P-256, P-384 or P-521, PEM.")
@force_option
@output_options
def sign(folder: Path, key: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Sign FOLDER, a student or a bundle: write model.sig, over every file of it that is read.

    An encrypted key takes its password from the variable PHREG_KEY_PASSWORD. Sign a bundle again after `build`: its
    engines have a signature of their own, engines.sig. docs/sharing.md says how to make a pair of keys.

    \b
    Examples:
      phreg-deploy sign student.bundle --key key.pem
      phreg-deploy verify student.bundle --public-key key.pub
    """
    from phreg_deploy.signing import sign as run
    from phreg_deploy.signing.signature import PASSWORD

    result = Result(as_json, quiet)
    signed = run(folder, key, password=os.environ.get(PASSWORD), force=force)
    result.say(f"Signed {len(signed.files)} files of the {signed.kind} {folder}: {', '.join(signed.signatures)}.")
    result.json(signed.to_json())
