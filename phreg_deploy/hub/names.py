"""Read names of repositories on the Hugging Face hub, written as timm writes them: ``hf-hub:org/name@revision``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from phreg_deploy.errors import PhregError

PREFIX = "hf-hub:"
# The hub's own rule for names: letters, digits, "-", "_" and ".", at most 96 characters, after one owner.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,254}", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A repository and a revision: a branch, a tag or a commit; None for the newest commit of the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_hub_name(name: str) -> bool:
    """Return whether a name stands for a repository on the hub, however it goes on."""
    return name.startswith(PREFIX)


def parse_hub_name(name: str) -> HubName:
    """Split ``hf-hub:org/name[@revision]``. Raises ``PhregError`` for any other text after ``hf-hub:``."""
    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    check_repository(repository, name)
    if at and (not REVISION.fullmatch(revision) or ".." in revision):
        raise PhregError(f"hub: got the revision {revision!r} in {name}, expected a branch, a tag or a commit.")
    return HubName(repository, revision or None)


def check_repository(repository: str, name: str | None = None) -> None:
    """Raise ``PhregError`` unless ``repository`` is ``org/name``. ``name``: what the user wrote, for the message."""
    odd = ".." in repository or "--" in repository or repository.endswith((".git", "-", "."))
    if odd or not REPOSITORY.fullmatch(repository):
        raise PhregError(
            f"hub: got {name or repository!r}, expected the owner and the name of a repository, as in "
            f"{PREFIX if name else ''}org/name: letters, digits, '-', '_' and '.'."
        )
