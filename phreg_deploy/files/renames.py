"""Renames that the system makes in one step where it can: exchange two names, and take a name that is free."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

HERE = -100  # AT_FDCWD: paths are relative to the working folder
NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2, from linux/fs.h
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False where the system or the file system cannot, or where one is missing."""
    return _rename(one, other, EXCHANGE) == 0


def claim(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, a name that nothing has.

    Where the system cannot do both in one step, ``target`` is looked at first; an empty folder that appears in between is
    replaced, and nothing else is.

    Raises:
        FileExistsError: something has the name. OSError: another refusal.
    """
    number = _rename(source, target, NO_REPLACE)
    if number == 0:
        return
    if number == errno.EEXIST or os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in TAKEN:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        raise


def _rename(source: Path, target: Path, flag: int) -> int:
    """The error number of ``renameat2``, 0 for success; ``ENOSYS`` where there is none."""
    call = _renameat2()
    if call is None:
        return errno.ENOSYS
    ctypes.set_errno(0)
    done = call(HERE, os.fsencode(source), HERE, os.fsencode(target), flag)
    return 0 if done == 0 else ctypes.get_errno() or errno.EIO


def _renameat2() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):  # another system, or a C library without it
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call  # type: ignore[no-any-return]
