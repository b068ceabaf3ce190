"""Write a student: ``config.json`` and ``model.safetensors``, which stock timm loads, and its record ``phreg.json``."""

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
from phreg_deploy.student_record import NEWEST, RECORD, read_record

__all__ = ["read_record", "write_record", "write_student"]


def write_student(student: ViT, record: dict[str, Any], folder: Path) -> None:
    """Write the files into an existing folder; ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it.

    Raises:
        OSError: the system refuses to write.
    """
    arguments = {k: v for k, v in model_arguments(student).items() if k != "num_classes"}
    try:
        save_for_hf(student, str(folder), model_args=arguments, safe_serialization=True)
    # safetensors reports an error of the system as "... (os error 28)".
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    write_record(record, folder)
    # safetensors ignores the umask and writes with mode 0600.
    for path in folder.iterdir():
        path.chmod((folder / RECORD).stat().st_mode)


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write or replace ``phreg.json`` in a student's folder."""
    text = json.dumps({"format": NEWEST, **record}, indent=1, sort_keys=True) + "\n"
    write_atomic(folder / RECORD, text.encode())
