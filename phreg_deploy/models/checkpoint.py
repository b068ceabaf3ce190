"""A student on disk: ``config.json`` and ``model.safetensors`` that stock timm loads, and ``phreg.json`` with its story."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import save_for_hf

from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import model_arguments
from phreg_deploy.student_record import RECORD, RECORD_VERSION, read_record

__all__ = ["read_record", "write_record", "write_student"]


def write_student(student: ViT, record: dict[str, Any], folder: Path) -> None:
    """Write the three files into an existing folder. ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads it back."""
    arguments = {k: v for k, v in model_arguments(student).items() if k != "num_classes"}
    try:
        save_for_hf(student, str(folder), model_args=arguments, safe_serialization=True)
    except SafetensorError as error:  # how safetensors says that the system refused: "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    write_record(record, folder)
    for path in folder.iterdir():  # safetensors writes 0600 whatever the umask is
        path.chmod((folder / RECORD).stat().st_mode)


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write ``phreg.json`` into a student's folder, or replace it."""
    text = json.dumps({"format": RECORD_VERSION, **record}, indent=1, sort_keys=True) + "\n"
    write_atomic(folder / RECORD, text.encode())
