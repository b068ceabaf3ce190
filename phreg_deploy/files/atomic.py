"""Write an output beside its target under a temporary name, then rename it: it is whole, or it is not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phreg_deploy.errors import FORCE, PhregError, write_error
from phreg_deploy.files.renames import claim, exchange
from phreg_deploy.files.temporary import make_locked_file, make_locked_folder, open_locked, remove_dead, temporary

# A file that marks an output of this project: a student, a bundle, extracted features, the demo.
MARKS = (
    "phreg.json",
    "manifest.json",
    "features.json",
    "extraction.json",
    "demo.json",
    "head.json",
    "evaluation.json",
    "repository.json",
)
# Attempts at a name that other processes write too.
ATTEMPTS = 100


def check_target(target: Path, force: bool, reads: Iterable[Path | None] = ()) -> None:
    """Raise ``PhregError`` for an output that exists (without ``force``) or cannot be written, before any work is done.

    ``reads``: the command's inputs; ``force`` replaces neither them nor a folder that holds them.
    """
    if target.name in ("", ".."):
        raise PhregError(f"output: got {str(target)!r}, expected the name of a folder that is to be written.")
    # First, because this may give an old output its name back.
    remove_dead(target.parent, target.name)
    if os.path.islink(target):
        raise PhregError(
            f"output: {target} is a symbolic link to {os.readlink(target)}; expected the name of a folder. "
            "Name what it points to."
        )
    if os.path.exists(target) and not force:
        raise PhregError(f"output: {target} exists already; add {FORCE} to replace it, or choose another name.")
    _check_replaceable(target)
    for source in reads:
        if source is None or not os.path.exists(target):
            continue
        if target.resolve() in (source.resolve(), *source.resolve().parents):
            raise PhregError(f"output: {target} holds {source}, which is read here; choose another name.")
    parent = target.parent
    if not os.path.isdir(parent):
        raise PhregError(f"output: there is no folder {parent} to write {target.name} into; create it first.")
    # Write instead of reading permission bits, which do not bind root or network mounts.
    try:
        probe = temporary(target, "probe")
        try:
            probe.mkdir()
        finally:
            with suppress(FileNotFoundError):
                probe.rmdir()
    except OSError as error:
        raise write_error(error, target) from None


def _check_replaceable(target: Path) -> None:
    if os.path.isfile(target):
        raise PhregError(f"output: {target} is a file; expected the name of a folder.")
    if os.path.isdir(target) and _holds_other_files(target):
        raise PhregError(
            f"output: {target} holds files that phreg-deploy did not write, and --force replaces only what it wrote; "
            "choose another name."
        )


def _holds_other_files(target: Path) -> bool:
    """Whether a folder holds files, but none that marks an output of this project.

    Another process may move the folder away and empty it during the listing, so the answer counts only if the folder
    still has its name afterwards.
    """
    for _ in range(ATTEMPTS):
        try:
            before = os.stat(target)
            with os.scandir(target) as entries:
                files = {entry.name: entry.is_file() for entry in entries}
            if not files or any(files.get(mark) for mark in MARKS):
                return False
            if os.path.samestat(before, os.stat(target)):
                return True
        except FileNotFoundError:
            return False
    return True


@contextmanager
def atomic_folder(target: Path, force: bool = False, reads: Iterable[Path | None] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``; rename it to ``target`` if the block succeeds, else remove it.

    ``force`` replaces an output that exists, in one step if the system can exchange two names. At any moment, and
    after any interrupt, ``target`` is the old output or the new one. Raises ``PhregError`` as ``check_target``, or if
    ``target`` appeared meanwhile.
    """
    check_target(target, force, reads)
    try:
        partial, descriptor = make_locked_folder(target)
    except OSError as error:
        raise write_error(error, target) from error
    try:
        yield partial
        _publish(partial, target, force)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        # This is a failed output, or the old one.
        shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)
    if os.path.lexists(partial):
        raise PhregError(f"output: {target} was written, but the old one cannot be removed; remove {partial} by hand.")


def _publish(partial: Path, target: Path, force: bool) -> None:
    """Rename ``partial`` to ``target``; an old output is then called ``partial``."""
    for _ in range(ATTEMPTS):
        try:
            if not force or not os.path.lexists(target):
                claim(partial, target)
            else:
                _check_replaceable(target)
                if not exchange(partial, target):
                    _replace(partial, target)
            return
        except FileExistsError:
            if not force:
                raise PhregError(
                    f"output: {target} appeared while this was at work, so it was kept and nothing was written; "
                    f"choose another name, or add {FORCE} to replace it."
                ) from None
        except FileNotFoundError:
            # Another process removed the target, or is replacing it in three steps.
            if not os.path.lexists(partial):
                raise
    raise PhregError(f"output: {target} comes and goes; another process writes it too. Choose another name.")


def _replace(partial: Path, target: Path) -> None:
    """Exchange two names in three steps; an interrupt leaves the old output or the new one as ``target``."""
    aside, lock = temporary(target, "old"), None
    # The lock keeps ``remove_dead`` of other processes away.
    with suppress(OSError):
        lock = open_locked(target)
    try:
        os.rename(target, aside)
        claim(partial, target)
    finally:
        _put_back(aside, target)
        if lock is not None:
            os.close(lock)


def _put_back(aside: Path, target: Path) -> None:
    """Give an old output its name back, or remove it if a new one has the name."""
    with suppress(FileExistsError):
        if os.path.lexists(aside) and not os.path.lexists(target):
            claim(aside, target)
    shutil.rmtree(aside, ignore_errors=True)


def write_atomic(target: Path, data: bytes) -> None:
    """Write one file whole or not at all, in place of an old one. Raises ``PhregError`` if the system refuses to."""
    with draft_file(target, data) as partial:
        os.replace(partial, target)


@contextmanager
def draft_file(target: Path, data: bytes) -> Iterator[Path]:
    """Write a file beside ``target`` under a temporary name, for a block that may rename it to ``target``.

    It is removed after the block if it still has that name. Raises ``PhregError`` for an ``OSError``, of the block too.
    """
    try:
        partial, descriptor = make_locked_file(target)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                yield partial
        finally:
            # A read-only file system refuses to unlink even a file that is not there.
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, target) from error
