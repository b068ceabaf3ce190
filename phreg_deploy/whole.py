"""Outputs that are whole or not there: written beside the target under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phreg_deploy.errors import PhregError
from phreg_deploy.renames import claim, exchange
from phreg_deploy.scratch import make_file, make_folder, remove_dead, take, temporary

# What this project's outputs are known by: a student, a bundle, extracted features, the demo.
MARKS = ("phreg.json", "manifest.json", "features.json", "demo.json")
ATTEMPTS = 100  # at a name that other processes give and take


def check_target(target: Path, force: bool, reads: Iterable[Path | None] = ()) -> None:
    """Refuse, before any work is done, an output that exists (without ``force``) or cannot be written.

    Args:
        reads: what the command reads; ``force`` never replaces it, nor a folder that holds it.

    Raises:
        PhregError: it exists, it is a symbolic link, its parent is missing, or the folder is read-only.
    """
    if target.name in ("", ".."):
        raise PhregError(f"output: got {str(target)!r}, expected the name of a folder that is to be written.")
    remove_dead(target.parent, target.name)  # before it is looked at: an old output may get its name back
    if os.path.islink(target):
        raise PhregError(
            f"output: {target} is a symbolic link to {os.readlink(target)}; expected the name of a folder. Name what it points to."
        )
    if os.path.exists(target) and not force:
        raise PhregError(f"output: {target} exists already; add --force to replace it, or choose another name.")
    _check_replaceable(target)
    for source in reads:
        if (
            source is not None
            and os.path.exists(target)
            and target.resolve() in (source.resolve(), *source.resolve().parents)
        ):
            raise PhregError(f"output: {target} holds {source}, which is read here; choose another name.")
    parent = target.parent
    if not os.path.isdir(parent):
        raise PhregError(f"output: there is no folder {parent} to write {target.name} into; create it first.")
    try:  # asking the system beats reading permission bits, which do not bind root or network mounts
        probe = temporary(target, "probe")
        probe.mkdir()
        with suppress(FileNotFoundError):
            probe.rmdir()
    except OSError as error:
        raise write_error(error, target) from None


def _check_replaceable(target: Path) -> None:
    if os.path.isfile(target):
        raise PhregError(f"output: {target} is a file; expected the name of a folder.")
    if os.path.isdir(target) and _holds_other_files(target):
        raise PhregError(
            f"output: {target} holds files that phreg-deploy did not write, and --force replaces only what it wrote; choose another name."
        )


def _holds_other_files(target: Path) -> bool:
    """Whether a folder holds files, and none that marks an output of this project.

    Another process may move the folder away and remove it while it is listed, so a folder without a mark counts only if it
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


def write_error(error: OSError, target: Path) -> PhregError:
    """The error that says what the system refused."""
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
    """A temporary folder beside ``target`` that takes its name when the block ends well, and vanishes when not.

    With ``force``, an output that exists is replaced in one step where the system can exchange two names; until then, and
    after any interrupt, ``target`` is the old output or the new one.

    Raises:
        PhregError: as ``check_target``; or ``target`` appeared meanwhile, and there is no ``force``.
    """
    check_target(target, force, reads)
    try:
        partial, descriptor = make_folder(target)
    except OSError as error:
        raise write_error(error, target) from error
    try:
        yield partial
        _publish(partial, target, force)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what failed, or the old output
        if descriptor is not None:
            os.close(descriptor)
    if os.path.lexists(partial):
        raise PhregError(
            f"output: {target} was written, but the one before it, now {partial}, cannot be removed; remove it by hand."
        )


def _publish(partial: Path, target: Path, force: bool) -> None:
    """Give ``partial`` the name ``target``; what had it before is ``partial`` then."""
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
                    f"output: {target} appeared while this was at work, so it was kept and nothing was written; choose another name, "
                    "or add --force to replace it."
                ) from None
        except FileNotFoundError:  # another process took it away, or exchanges it in three steps
            if not os.path.lexists(partial):
                raise
    raise PhregError(f"output: {target} comes and goes; another process writes it too. Choose another name.")


def _replace(partial: Path, target: Path) -> None:
    """Exchange two names in three steps; however they end, ``target`` is the old output or the new one."""
    aside, held = temporary(target, "old"), None
    with suppress(OSError):
        held = take(target)  # so that no other process takes it for a dead one's
    try:
        os.rename(target, aside)
        claim(partial, target)
    finally:
        _put_back(aside, target)
        if held is not None:
            os.close(held)


def _put_back(aside: Path, target: Path) -> None:
    """Give an old output its name again, unless a new one has it; then remove the old one."""
    with suppress(FileExistsError):
        if os.path.lexists(aside) and not os.path.lexists(target):
            claim(aside, target)
    shutil.rmtree(aside, ignore_errors=True)


def write_whole(target: Path, data: bytes) -> None:
    """One file, whole or not at all; replaces what was there.

    Raises:
        PhregError: full disk, read-only or missing folder.
    """
    try:
        partial, descriptor = make_file(target)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.replace(partial, target)
        finally:
            with suppress(OSError):  # a read-only file system refuses to unlink what is not there
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, target) from error
