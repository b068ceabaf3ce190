"""Which files of a student or a bundle a signature is over, and which it leaves out."""

from __future__ import annotations

import os
from pathlib import Path

from phreg_deploy.bundle.bundle import Bundle, is_bundle
from phreg_deploy.bundle.manifest import ENGINES, ENGINES_SIGNATURE, MANIFEST, SIGNATURE
from phreg_deploy.cards.metadata import CARD
from phreg_deploy.cards.student import PICTURE
from phreg_deploy.errors import PhregError
from phreg_deploy.json_files import is_regular
from phreg_deploy.student_record import RECORD, read_record

STUDENT = ("config.json", "model.safetensors", RECORD)
# What the library leaves out by itself, and where `hf download` notes its work. None of it is read.
UNREAD = (".git", ".gitattributes", ".github", ".gitignore", ".cache")
# Not signed: people edit the card, `push` writes a name into it, and engines have a signature of their own.
UNSIGNED = (CARD, PICTURE, ENGINES, SIGNATURE, ENGINES_SIGNATURE, *UNREAD)


def list_signed(folder: Path) -> tuple[str, list[str]]:
    """Check a student or a bundle before it is signed; return which of both it is, and the files to sign.

    Raises:
        PhregError: neither of both, a damaged one, or a file that belongs to neither.
    """
    if is_bundle(folder):
        bundle = Bundle.read(folder)
        bundle.verify()
        kind, names = "bundle", [MANIFEST, *bundle.manifest.files]
    else:
        if not folder.is_dir():
            raise PhregError(f"sign: got {folder}, where there is no folder; expected a student or a bundle.")
        if read_record(folder) is None:
            raise PhregError(f"sign: {folder} holds neither {MANIFEST} nor {RECORD}; expected a student or a bundle.")
        kind, names = "student", list(STUDENT)
    there = list_present(folder)
    strange, missing = sorted(set(there) - set(names)), sorted(set(names) - set(there))
    if strange:
        raise PhregError(
            f"sign: {folder} holds {', '.join(strange[:5])}, which is no part of a {kind}; move it to another folder."
        )
    if missing:
        raise PhregError(f"sign: {folder} lacks {', '.join(missing)}; copy or write the {kind} again.")
    return kind, sorted(names)


def list_present(folder: Path, left_out: tuple[str, ...] = UNSIGNED) -> list[str]:
    """List the files of a folder that its signature must be over, by name.

    Raises:
        PhregError: a folder, a pipe or a device among them, or a link to one; no folder.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name not in left_out)
    except OSError as error:
        raise PhregError(f"signature: {folder} cannot be read ({error.strerror}); expected a folder.") from None
    for name in names:
        try:
            regular = is_regular(folder / name)
        except OSError as error:
            raise PhregError(f"signature: {folder / name} cannot be read ({error.strerror}).") from None
        if not regular:
            raise PhregError(f"signature: {folder / name} is no regular file; remove it, or copy the folder again.")
    return names
