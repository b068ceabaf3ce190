"""``phreg.json``: the story of a student, as ``distill`` wrote it. Read without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError

RECORD = "phreg.json"
RECORD_VERSION = 1


def model_path(name: str) -> Path:
    """Where a model's name points if it names a folder, ``FOLDER`` or ``local-dir:FOLDER``; nothing is there for a timm name."""
    return Path(name.removeprefix("local-dir:"))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The student's story, or None for a folder that ``distill`` did not write, or none at all.

    Raises:
        PhregError: the record is damaged, or of a newer format.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        version = int(record["format"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise PhregError(f"student: {path} is damaged; copy or distil the student again.") from None
    if version > RECORD_VERSION:
        raise PhregError(
            f"student: {path} has format {version}, expected at most {RECORD_VERSION}. Upgrade phreg-deploy."
        )
    return record


def recorded(record: dict[str, Any], folder: Path, *keys: str) -> Any:
    """``record[key][key]...``; a record without it is damaged."""
    value: Any = record
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise PhregError(
                f"student: {folder / RECORD} is damaged (no {'.'.join(keys)}); copy or distil the student again."
            )
        value = value[key]
    return value


def scored(record: dict[str, Any], folder: Path, *keys: str) -> Any:
    """``record["scores"][key]...``; None for a student that could not be scored."""
    return None if "missing" in recorded(record, folder, "scores") else recorded(record, folder, "scores", *keys)
