"""Read class names: one class a line, commas between the synonyms of a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phreg_deploy.arguments import refuse_url
from phreg_deploy.bundle.heads import MOST_CLASSES
from phreg_deploy.errors import PhregError


def read_names(path: Path) -> list[tuple[str, ...]]:
    """Read a file of class names: the synonyms of each class, its own name first.

    Raises:
        PhregError: the file is missing or no UTF-8 text, or ``check_names`` refuses it.
    """
    refuse_url(str(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PhregError(f"classes: {path} cannot be read ({error}); expected one class a line.") from None
    return check_names(lines, str(path))


def check_names(lines: Sequence[str], where: str) -> list[tuple[str, ...]]:
    """Split lines into synonyms; empty lines are left out.

    Raises:
        PhregError: no class, more than 8 bits have, an empty name, or a name that is there twice.
    """
    classes = [tuple(name.strip() for name in line.split(",")) for line in lines if line.strip()]
    if not 1 <= len(classes) <= MOST_CLASSES:
        raise PhregError(f"classes: {where} holds {len(classes)} classes, expected 1 to {MOST_CLASSES}, one a line.")
    flat = [name for names in classes for name in names]
    if "" in flat:
        raise PhregError(f"classes: {where} has an empty name between commas; expected names, e.g. car, automobile.")
    twice = next((name for name in flat if flat.count(name) > 1), None)
    if twice is not None:
        raise PhregError(f"classes: {where} has the name {twice!r} twice, expected each name once.")
    return classes
