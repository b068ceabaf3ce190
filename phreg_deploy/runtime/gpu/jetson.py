"""Read the release of Jetson Linux (L4T) from the files of a Jetson."""

from __future__ import annotations

import re
from pathlib import Path


def read_text(path: Path) -> str:
    """A system file without its final NUL, blanks and newlines; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\x00 \n")
    except OSError:
        return ""


def read_l4t(root: Path) -> tuple[int, ...] | None:
    """The release below ``root``, e.g. (36, 4, 3); () if the file has another form, None if there is no file."""
    text = read_text(root / "etc/nv_tegra_release")
    match = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", text)
    if match is None:
        return () if text else None
    return tuple(int(number) for number in re.findall(r"\d+", f"{match[1]}.{match[2]}"))
