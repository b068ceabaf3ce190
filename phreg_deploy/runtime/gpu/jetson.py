"""Recognise a Jetson, and read the release of its Jetson Linux (L4T), from its files."""

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


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether this machine is a Jetson. A container may lack all files but the device tree."""
    return read_l4t(root) is not None or "nvidia,tegra" in read_text(root / "proc/device-tree/compatible")
