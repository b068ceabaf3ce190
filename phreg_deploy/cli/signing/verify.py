"""The command ``verify``: refuse a student or a bundle that is not signed, or not as it was signed."""

from __future__ import annotations

from pathlib import Path

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import output_options, public_key_option
from phreg_deploy.errors import PhregError


@click.command()
@click.argument("folder")
@public_key_option
@output_options
def verify(folder: str, public_key: Path | None, as_json: bool, quiet: bool) -> None:
    """Verify that FOLDER, a student or a bundle, is as the holder of the private key signed it; else exit code 2.

    Nothing of it is loaded. `extract`, `watch`, `serve`, `check` and `export` take --public-key as well.

    \b
    Examples:
      phreg-deploy verify student.bundle --public-key key.pub
      phreg-deploy verify hf-hub:my-name/dino-registers-int8 --public-key key.pub
    """
    from phreg_deploy.signing import verify_signature

    if public_key is None:
        raise PhregError("verify: --public-key is missing; give the public key of whoever signed it.")
    result = Result(as_json, quiet)
    signed = verify_signature(folder, public_key)
    result.say(f"{len(signed.files)} files of the {signed.kind} {folder} are as {public_key} signed them.")
    result.json(signed.to_json())
