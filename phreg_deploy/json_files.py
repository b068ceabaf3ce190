"""Files that others may have written: JSON that is read whole or refused with one kind of error, and files that end."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError

LARGEST = 64 << 20  # bytes; the largest of ours, the record of a calibration, has less than one hundredth of it

DEVICES = ("/proc", "/sys", "/dev")  # a link into them may name what never ends


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: too large, not UTF-8, not JSON, nested too deeply, or text that cannot be printed. OSError: the system
            refuses.
    """
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MB")
    try:
        value = json.loads(data.decode())
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair can be read, but not written again
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def check_regular(folder: Path, names: Sequence[str]) -> None:
    """Raise unless these are files, or links to files, that end: no devices, pipes or views of the kernel."""
    missing = []
    for name in names:
        path = folder / name
        try:
            regular = stat.S_ISREG(os.stat(path).st_mode)
        except OSError:
            missing.append(name)
            continue
        if not regular or (path.is_symlink() and str(path.resolve()).startswith(DEVICES)):
            raise PhregError(f"bundle: {path} is no regular file; copy or export the bundle again.")
    if missing:
        raise PhregError(f"bundle: {folder} lacks {', '.join(missing)}; copy or export the bundle again.")
