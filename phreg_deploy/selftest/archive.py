"""Write all findings into one archive, without the names of users, hosts and folders."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import re
import socket
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from phreg_deploy.errors import FORCE, PhregError, write_error
from phreg_deploy.files.atomic import write_atomic
from phreg_deploy.spec import plain

# A path with at least two parts that begins at the root or a drive, and is no address; its last part stays.
PATH = re.compile(r"(?<![\w.<)\]/\\-])(?<!https:)(?<!http:)(?:[A-Za-z]:)?(?:[/\\]+[\w.+@~=-]+)+[/\\]+(?=[\w.+@~=-])")
# Names that say nothing of a person.
COMMON = {"root", "user", "ubuntu", "nvidia", "jetson", "localhost", "runner", "docker", "home"}


def check_archive(target: Path, force: bool) -> None:
    """Raise ``PhregError`` unless the archive can be written, before any work is done."""
    if target.suffix != ".zip":
        raise PhregError(f"output: got {target}, expected the name of a .zip, e.g. selftest.zip.")
    if target.is_dir():
        raise PhregError(f"output: {target} is a folder; expected the name of a .zip.")
    if target.exists() and not force:
        raise PhregError(f"output: {target} exists already; add {FORCE} to replace it, or choose another name.")
    if not target.absolute().parent.is_dir():
        raise PhregError(f"output: there is no folder {target.parent} to write {target.name} into; create it first.")


class Archive:
    """Texts by name, which ``write`` stores as one .zip."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def add(self, name: str, content: Any) -> None:
        """Add a text, or anything else as JSON."""
        text = content if isinstance(content, str) else json.dumps(plain(content), indent=1, default=str)
        self._texts[name] = anonymous(text)

    def write(self, target: Path) -> None:
        """Write the archive whole or not at all. Raises ``PhregError`` if the system refuses to."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in self._texts.items():
                archive.writestr(name, text)
        try:
            write_atomic(target, buffer.getvalue())
        except OSError as error:
            raise write_error(error, target) from error


def anonymous(text: str) -> str:
    """Replace the folders of all paths, the user's name and the host's name."""
    for folder in sorted(own_folders(), key=len, reverse=True):
        text = text.replace(folder, "...")
    text = PATH.sub(".../", text)
    for word, other in names():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", other, text, flags=re.IGNORECASE)
    return text


def own_folders() -> list[str]:
    """The folders of the user, of this process, of Python and of temporary files, which may have blanks in them."""
    folders = [sys.prefix, tempfile.gettempdir()]
    for read in (Path.home, Path.cwd):
        # The folder may be gone, and a container may have no home.
        with contextlib.suppress(OSError, RuntimeError):
            folders.append(str(read()))
    return [folder for folder in folders if len(Path(folder).parts) > 1]


def names() -> list[tuple[str, str]]:
    """The names of the user, of the home folder and of the host that may tell who runs this, and their replacements."""
    found = []
    for read, other in ((getpass.getuser, "USER"), (lambda: Path.home().name, "USER"), (socket.gethostname, "HOST")):
        try:
            word = read()
        # A container may have no entry for its user, and no home.
        except (OSError, KeyError, ImportError, RuntimeError):
            continue
        if len(word) > 2 and word.lower() not in COMMON:
            found.append((word, other))
    return sorted(found, key=lambda pair: -len(pair[0]))
