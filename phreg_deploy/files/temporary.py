"""Temporary names beside an output. A lock says whether the process that made one still runs, whatever its number is."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without flock: leftovers stay
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"\.(?P<target>.+)\.(?P<kind>writing|probe|old)-[0-9a-f]{12}")


def temporary(target: Path, kind: str) -> Path:
    """A name beside ``target`` that no other process draws. ``kind``: "writing", "probe" or "old"."""
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(6)}")


def make_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder beside ``target``, and the descriptor that locks it until it is closed; None where there are no locks."""
    while True:
        path = temporary(target, "writing")
        path.mkdir()
        try:
            return path, take(path)
        except (BlockingIOError, FileNotFoundError):  # ``remove_dead`` of another process came in between
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            return path, None


def make_file(target: Path) -> tuple[Path, int]:
    """A new file beside ``target``, and its descriptor, locked where there are locks."""
    while True:
        path = temporary(target, "writing")
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


def take(path: Path) -> int:
    """The descriptor of a file or folder, locked until it is closed.

    Raises:
        BlockingIOError: another process has it. FileNotFoundError: it is gone. OSError: there are no locks here.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        _lock(path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_here(path: Path, descriptor: int | None) -> bool:
    """Whether ``path`` names what the descriptor has open."""
    try:
        return descriptor is not None and os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def remove_dead(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in ``folder`` of the output ``name``, by default of any.

    An old output that was moved aside gets its name back where nothing has taken it. What is locked, and all that cannot be
    locked, is left alone.
    """
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return
    for path in found:
        match = NAME.fullmatch(path.name)
        if match is None or name not in (None, match["target"]):
            continue
        try:
            descriptor = take(path)
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
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not is_here(path, descriptor):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
