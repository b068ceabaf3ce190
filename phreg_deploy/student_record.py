"""Read ``phreg.json``, the record that ``distill`` writes beside a student. Needs no PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError
from phreg_deploy.hub.download import local_path
from phreg_deploy.json_files import read_json
from phreg_deploy.readout import PLAIN, Readout

RECORD = "phreg.json"
# The format of the record.
NEWEST = 1


def model_path(name: str) -> Path:
    """Return the path in ``FOLDER`` or ``local-dir:FOLDER``; for a timm name, a path that does not exist.

    ``hf-hub:org/name`` is downloaded; raises as ``hub.download.local_path``.
    """
    return local_path(name.removeprefix("local-dir:"))


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a student's record, None if there is none. Raises ``PhregError`` if it is damaged or of a newer format."""
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
    """Return ``record[key][key]...``. Raises ``PhregError`` if a key is missing."""
    value: Any = record
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            key = ".".join(keys)
            raise PhregError(f"student: {folder / RECORD} is damaged (no {key}); copy or distil the student again.")
        value = value[key]
    return value


def recorded_readout(record: dict[str, Any] | None, folder: Path) -> Readout:
    """Return what is read out of a student; the final tokens if there is no record or it is older than readouts."""
    if record is None or "readout" not in record:
        return PLAIN
    try:
        return Readout.from_json(record["readout"])
    except PhregError as error:
        raise PhregError(
            f"student: {folder / RECORD} is damaged ({error}); copy or distil the student again."
        ) from None


def read_readout(model: str, name: str | None, project: bool | None, random_weights: bool = False) -> Readout:
    """Return the readout that a user asks for; what is None comes from a student's record, else the final tokens.

    Raises ``PhregError`` for another name than those of ``phreg_deploy.readout``, or for a damaged record.
    """
    folder = model_path(model)
    stored = recorded_readout(None if random_weights else read_record(folder), folder)
    return Readout(stored.name if name is None else name, stored.project if project is None else project)


def recorded_median(record: dict[str, Any], folder: Path) -> float | None:
    """Return the base model's median patch-token norm, None if it was not measured; raises as ``recorded``."""
    if "missing" in recorded(record, folder, "scores"):
        return None
    median = recorded(record, folder, "scores", "median_norm")
    if median is None or (type(median) in (int, float) and 0 < median < float("inf")):
        return median  # type: ignore[no-any-return]
    raise PhregError(
        f"student: {folder / RECORD} is damaged (median norm {str(median)[:60]}, expected a number above 0); "
        "copy or distil the student again."
    )
