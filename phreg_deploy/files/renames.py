"""Exchange two names, or rename to a free name, in one step if the system can."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

# AT_FDCWD: paths are relative to the working folder.
WORKING_FOLDER = -100
# Flags of renameat2, from linux/fs.h.
NO_REPLACE, EXCHANGE = 1, 2
NAME_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False if the system or the file system cannot, or if one name is missing."""
    return _rename(one, other, EXCHANGE) == 0


def claim(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``. Raises ``FileExistsError`` if the name is taken, else ``OSError``.

    If the system cannot check and rename in one step, the check comes first; an empty folder that appears in between
    is replaced.
    """
    number = _rename(source, target, NO_REPLACE)
    if number == 0:
        return
    if number == errno.EEXIST or os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in NAME_TAKEN:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        raise


def _rename(source: Path, target: Path, flag: int) -> int:
    """Call ``renameat2`` and return its error number: 0 for success, ``ENOSYS`` on a system without it."""
    call = _renameat2()
    if call is None:
        return errno.ENOSYS
    ctypes.set_errno(0)
    done = call(WORKING_FOLDER, os.fsencode(source), WORKING_FOLDER, os.fsencode(target), flag)
    return 0 if done == 0 else ctypes.get_errno() or errno.EIO


def _renameat2() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):
        # Another system, or a C library without it.
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    call.restype = ctypes.c_int
    return call  # type: ignore[no-any-return]
