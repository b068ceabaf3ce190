"""A student on disk: ``config.json`` and ``model.safetensors`` that stock timm loads, and ``phreg.json`` with its story."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models import save_for_hf

from phreg_deploy.distill.source import model_arguments
from phreg_deploy.distill.taps import ViT
from phreg_deploy.errors import PhregError

RECORD = "phreg.json"
RECORD_VERSION = 1


def write_student(student: ViT, record: dict[str, Any], folder: Path) -> None:
    """Write the three files into an existing folder. ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads it back."""
    arguments = {k: v for k, v in model_arguments(student).items() if k != "num_classes"}
    save_for_hf(student, str(folder), model_args=arguments, safe_serialization=True)
    (folder / RECORD).write_text(json.dumps({"format": RECORD_VERSION, **record}, indent=1, sort_keys=True) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The student's story, or None for a timm folder that ``distill`` did not write.

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
