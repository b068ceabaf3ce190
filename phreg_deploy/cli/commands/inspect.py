"""``inspect``: the facts of a student or a bundle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import output_options
from phreg_deploy.cli.tables.inspect import bundle_rows, student_rows
from phreg_deploy.errors import PhregError
from phreg_deploy.json_files import read_json
from phreg_deploy.student_record import model_path, read_record

AGAIN = "copy or distil the student again."


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@output_options
def inspect(path: Path, as_json: bool, quiet: bool) -> None:
    """Print the facts of a student's folder or a BUNDLE, and verify a bundle's hashes.

    \b
    Example:
      phreg-deploy inspect student.bundle
    """
    from phreg_deploy.bundle.bundle import Bundle, is_bundle

    result = Result(as_json, quiet)
    if not is_bundle(path):
        _inspect_student(model_path(str(path)), result)
        return
    bundle = Bundle.read(path)
    bundle.verify()
    result.table(f"Bundle {path}", ["", ""], bundle_rows(bundle))
    result.json({"kind": "bundle", **bundle.manifest.to_json()})


def _inspect_student(path: Path, result: Result) -> None:
    config = _read_config(path)
    record = read_record(path)
    rows = [["architecture", str(config.get("architecture"))], ["arguments", json.dumps(config.get("model_args", {}))]]
    if record:
        try:
            rows += student_rows(record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise PhregError(f"inspect: {path / 'phreg.json'} is damaged ({reason}); {AGAIN}") from None
    result.table(f"Student {path}" if record else f"timm model {path}", ["", ""], rows)
    result.json({"kind": "student" if record else "timm", "config": config, "record": record})


def _read_config(path: Path) -> dict[str, Any]:
    """Read the ``config.json`` that timm writes. Raises ``PhregError`` if it is missing or damaged."""
    file = path / "config.json"
    if not os.path.isfile(file):
        raise PhregError(
            f"inspect: got {path}, where there is {_describe(path)}; expected a student's folder or a bundle."
        )
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise PhregError(f"inspect: {file} is damaged ({error}); {AGAIN}") from None
    if not isinstance(config, dict):
        raise PhregError(f"inspect: {file} is damaged (no object); {AGAIN}")
    return config


def _describe(path: Path) -> str:
    if not os.path.exists(path):
        return "nothing"
    return "a file" if os.path.isfile(path) else "a folder with neither manifest.json nor config.json"
