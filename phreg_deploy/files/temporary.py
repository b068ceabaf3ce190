"""Temporary names beside an output, locked by the process that writes them.

A lock ends with its process, so another process can tell leftovers of a killed one from work in progress. Process
numbers cannot tell: those of containers repeat.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from phreg_deploy.errors import PhregError, write_error

try:
    import fcntl
except ImportError:
    # A system without flock: leftovers stay.
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"\.(?P<target>.+)\.(?P<kind>writing|probe|old)-[0-9a-f]{12}")


def temporary(target: Path, kind: str) -> Path:
    """Draw a random name beside ``target``. ``kind``: "writing", "probe" or "old"."""
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(6)}")


@contextlib.contextmanager
def folder_beside(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` for the block; those of killed processes for ``target`` are removed.

    ``mode``: its permissions, less the umask. Raises ``PhregError`` if it cannot be made.
    """
    remove_dead(target.parent, target.name)
    try:
        path, descriptor = make_locked_folder(target, mode)
    except OSError as error:
        raise write_error(error, target) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def scratch_folder(name: str) -> contextlib.AbstractContextManager[Path]:
    """Return a ``folder_beside`` for files of no output, in the system's folder for temporary files.

    ``name`` says what it is for; a killed process leaves it until the next one of that name. Nobody else may read it.
    Raises ``PhregError`` if the system has no folder for temporary files that can be written to.
    """
    try:
        return folder_beside(Path(tempfile.gettempdir()) / name, 0o700)
    except FileNotFoundError as error:
        raise PhregError(f"temporary files: {error.strerror}. Free space, or set TMPDIR to another folder.") from None


def make_locked_folder(target: Path, mode: int = 0o777) -> tuple[Path, int | None]:
    """Make a folder beside ``target``; closing the descriptor unlocks it. The descriptor is None without locks."""
    while True:
        path = temporary(target, "writing")
        try:
            path.mkdir(mode)
            try:
                return path, open_locked(path)
            except (BlockingIOError, FileNotFoundError):
                # Another process's ``remove_dead`` found the folder before it was locked.
                shutil.rmtree(path, ignore_errors=True)
            except OSError:
                return path, None
        except KeyboardInterrupt:
            shutil.rmtree(path, ignore_errors=True)
            raise


def make_locked_file(target: Path) -> tuple[Path, int]:
    """Make a file beside ``target``; its descriptor is locked if the system has locks."""
    while True:
        path = temporary(target, "writing")
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            try:
                _lock(path, descriptor)
            except (BlockingIOError, FileNotFoundError):
                os.close(descriptor)
                path.unlink(missing_ok=True)
                continue
            except OSError:
                pass
            return path, descriptor
        except KeyboardInterrupt:
            path.unlink(missing_ok=True)
            raise


def open_locked(path: Path) -> int:
    """Open a file or folder and lock it until the returned descriptor is closed.

    Raises ``BlockingIOError`` if another process holds the lock, ``FileNotFoundError`` if the file is gone, and
    ``OSError`` if the system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        _lock(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file or folder."""
    try:
        os.close(open_locked(path))
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def remove_dead(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in ``folder``, of the output ``name`` or of every output.

    An old output that was moved aside gets its name back if the name is free. Locked files, and files that cannot be
    locked, stay.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return
    for path in paths:
        match = NAME.fullmatch(path.name)
        if match is None or name not in (None, match["target"]):
            continue
        try:
            descriptor = open_locked(path)
        except OSError:
            continue
        with contextlib.suppress(OSError):
            if match["kind"] == "old" and not os.path.lexists(folder / match["target"]):
                os.rename(path, folder / match["target"])
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    """Lock ``descriptor``; raises ``FileNotFoundError`` if ``path`` names another file by then."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
