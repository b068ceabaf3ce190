"""Outputs that are whole or not there: written beside the target under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phreg_deploy.errors import PhregError

# What this project's outputs are known by: a student, a bundle, extracted features, the demo.
MARKS = ("phreg.json", "manifest.json", "features.json", "demo.json")


def check_target(target: Path, force: bool, reads: Iterable[Path | None] = ()) -> None:
    """Refuse, before any work is done, an output that exists (without ``force``) or cannot be written.

    Args:
        reads: what the command reads; ``force`` never replaces it, nor a folder that holds it.

    Raises:
        PhregError: it exists, its parent is missing, or the folder is read-only.
    """
    if not target.name:
        raise PhregError(f"output: got {str(target)!r}, expected the name of a folder that is to be written.")
    if target.exists() and not force:
        raise PhregError(f"output: {target} exists already; add --force to replace it, or choose another name.")
    if target.is_file():
        raise PhregError(f"output: {target} is a file; expected the name of a folder.")
    if target.is_dir() and any(target.iterdir()) and not any((target / mark).is_file() for mark in MARKS):
        raise PhregError(
            f"output: {target} holds files that phreg-deploy did not write, and --force replaces only what it wrote; choose another name."
        )
    for source in reads:
        if source is not None and target.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
            raise PhregError(f"output: {target} holds {source}, which is read here; choose another name.")
    parent = target.parent
    if not parent.is_dir():
        raise PhregError(f"output: there is no folder {parent} to write {target.name} into; create it first.")
    try:  # asking the system beats reading permission bits, which do not bind root or network mounts
        probe = parent / f".{target.name}.probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise write_error(error, target) from None


def write_error(error: OSError, target: Path) -> PhregError:
    """The system's refusal in words."""
    if error.errno == errno.ENOSPC:
        return PhregError(
            f"output: the disk is full, so {target} was not written; free space or choose another folder."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PhregError(
            f"output: {target.parent} cannot be written to ({os.strerror(error.errno)}); choose another folder."
        )
    return PhregError(f"output: {target} cannot be written ({error.strerror or error}).")


@contextmanager
def whole_folder(target: Path, force: bool = False, reads: Iterable[Path | None] = ()) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the block ends well, and vanishes when not."""
    check_target(target, force, reads)
    partial = target.parent / f".{target.name}.writing-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            retired = target.parent / f".{target.name}.old-{os.getpid()}"
            target.rename(retired)
            partial.rename(target)
            shutil.rmtree(retired)
        else:
            partial.rename(target)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(target: Path, data: bytes) -> None:
    """One file, whole or not at all; replaces what was there.

    Raises:
        PhregError: full disk, read-only or missing folder.
    """
    partial = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, target)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        with suppress(OSError):  # a read-only file system refuses to unlink what is not there
            partial.unlink(missing_ok=True)
