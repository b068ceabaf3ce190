"""Read JSON files that others may have written, and refuse devices and pipes in place of files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phreg_deploy.errors import PhregError

# Bytes of a JSON file. The largest that we write, calibration.json, takes less than one hundredth of it.
MOST_BYTES = 64 << 20
# A link into these may name a file without end.
DEVICES = ("/proc", "/sys", "/dev")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises ``ValueError`` if it is no regular file, too large, not UTF-8, not JSON, nested too deeply, or holds text
    that cannot be printed; ``OSError`` if it cannot be read.
    """
    if not is_regular(path):
        raise ValueError("it is a pipe, a device or a folder, expected a file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MB")
    try:
        value = json.loads(data.decode())
        # Half a surrogate pair can be read, but not written again.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def is_regular(path: Path | str) -> bool:
    """Whether a path is a regular file or a link to one: to open a pipe would wait for ever.

    Raises ``OSError`` if there is nothing.
    """
    return stat.S_ISREG(os.stat(path).st_mode)


def check_regular(folder: Path, names: Sequence[str]) -> None:
    """Raise ``PhregError`` unless these are regular files, or links to some: no devices, pipes or kernel files."""
    missing = []
    for name in names:
        path = folder / name
        try:
            regular = is_regular(path)
        except OSError:
            missing.append(name)
            continue
        if not regular or (path.is_symlink() and str(path.resolve()).startswith(DEVICES)):
            raise PhregError(f"bundle: {path} is no regular file; copy or export the bundle again.")
    if missing:
        raise PhregError(f"bundle: {folder} lacks {', '.join(missing)}; copy or export the bundle again.")
