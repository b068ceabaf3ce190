"""Define the errors that a user can cause, each with its exit code.

A message says what was got, what was expected and what to do, in this order. The command line prints it as one
paragraph without a traceback. Any other exception is a defect of this project.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

# How a message names these options: of a command, and of the Python function that it calls.
FORCE, RESUME = "--force (in Python force=True)", "--resume (in Python resume=True)"


class PhregError(Exception):
    """Bad input or bad usage. Exit code 2.

    ``report``: figures that ``--json`` prints together with the error, e.g. those of a missed gate.
    """

    exit_code = 2

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report or {}


class GateFailed(PhregError):
    """A measured figure missed its gate (parity, artifact rate, latency baseline). Exit code 3."""

    exit_code = 3


class BackendMissing(PhregError):
    """A backend or dependency is not installed or not usable on this machine. Exit code 4."""

    exit_code = 4


class Interrupted(PhregError):
    """Ctrl-C after part of the work was kept; the message says what. Exit code 130, or 143 after SIGTERM."""

    exit_code = 130


def write_error(error: OSError, target: Path) -> PhregError:
    """Turn a refusal of the system to write ``target`` into an error that says why."""
    if error.errno == errno.ENOSPC:
        return PhregError(f"output: the disk is full, so {target} was not written; free space, or use another folder.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = os.strerror(error.errno)
        return PhregError(f"output: {target.parent} cannot be written to ({reason}); choose another folder.")
    return PhregError(f"output: {target} cannot be written ({error.strerror or error}).")


def closed_error() -> PhregError:
    """The error of a call after ``close``, also where another thread closed the extractor during the call."""
    return PhregError("extract: this FeatureExtractor was closed; load the bundle again.")
