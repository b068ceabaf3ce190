"""Read ``phreg.json``, the record that ``distill`` writes beside a student. Needs no PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.json_files import read_json

RECORD = "phreg.json"
# The format of the record.
NEWEST = 1


def model_path(name: str) -> Path:
    """Return the path in ``FOLDER`` or ``local-dir:FOLDER``; for a timm name, a path that does not exist."""
    return Path(name.removeprefix("local-dir:"))


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a student's record, None if the folder has none or does not exist.

    Raises:
        PhregError: the record is damaged, or of a newer format.
    """
    path = folder / RECORD
    if not os.path.isfile(path):
        return None
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise PhregError(f"student: {path} is damaged ({error}); copy or distil the student again.") from None
    version = record.get("format") if isinstance(record, dict) else None
    if type(version) is not int:
        raise PhregError(f"student: {path} is damaged (no format number); copy or distil the student again.")
    if version > NEWEST:
        raise PhregError(f"student: {path} has format {version}, expected at most {NEWEST}. Upgrade phreg-deploy.")
    return dict(record)


def recorded(record: dict[str, Any], folder: Path, *keys: str) -> Any:
    """Return ``record[key][key]...``.

    Raises:
        PhregError: a key is missing, so the record is damaged.
    """
    value: Any = record
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise PhregError(
                f"student: {folder / RECORD} is damaged (no {'.'.join(keys)}); copy or distil the student again."
            )
        value = value[key]
    return value


def scored(record: dict[str, Any], folder: Path, *keys: str) -> Any:
    """Return ``record["scores"][key]...``, None for a student that could not be scored; raises as ``recorded``."""
    return None if "missing" in recorded(record, folder, "scores") else recorded(record, folder, "scores", *keys)


def recorded_median(record: dict[str, Any], folder: Path) -> float | None:
    """Return the base model's median patch-token norm, None if it was not measured; raises as ``recorded``."""
    median = scored(record, folder, "median_norm")
    if median is None or (type(median) in (int, float) and 0 < median < float("inf")):
        return median  # type: ignore[no-any-return]
    raise PhregError(
        f"student: {folder / RECORD} is damaged (median norm {str(median)[:60]}, expected a number above 0); "
        "copy or distil the student again."
    )
