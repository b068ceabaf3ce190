"""End a command on SIGTERM as on Ctrl-C: `docker stop` and schedulers send it, and temporary files are removed."""

from __future__ import annotations

import signal
from types import FrameType

from phreg_deploy.errors import Interrupted

# The exit code as a shell reports it: 128 and the number of the signal. That of Ctrl-C is 130.
TERMINATED = 143
_received: list[int] = []


def catch_termination() -> None:
    """Let the first SIGTERM interrupt the command; the second one kills it.

    Under torchrun nothing changes: it expects processes that end at once, even while they wait for each other.
    """
    from phreg_deploy.distill.devices.launch import find_launch

    if find_launch().count == 1:
        signal.signal(signal.SIGTERM, _interrupt)


def exit_code() -> int:
    """Return the exit code of an interrupted command."""
    return TERMINATED if _received else Interrupted.exit_code


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _received.append(number)
    handler = signal.getsignal(signal.SIGINT)
    # A shell starts background processes with SIGINT ignored.
    (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
