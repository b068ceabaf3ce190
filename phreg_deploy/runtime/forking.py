"""Keep a backend usable after a fork: a forked child has neither the threads nor the GPU context of its parent.

Without this, a call in the child waits for threads that do not exist, for instance OpenVINO's in throughput mode.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable

from phreg_deploy.errors import PhregError, closed_error
from phreg_deploy.runtime.backends.interface import Backend


class ForkSafeBackend:
    """``backend`` until it is closed; in a forked child None until ``reopened``.

    ``open_again`` opens the same backend in a forked child; None where a fork breaks it, as on a GPU. ``lock`` is a new
    one after a fork.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend: Backend | None = backend
        self.open_again: Callable[[], Backend] | None = None
        self._inherited: Backend | None = None
        self.lock = threading.Lock()
        _LIVING.add(self)

    def reopened(self) -> Backend:
        """Open the backend again in a forked child.

        Raises:
            PhregError: it was closed, or cannot be opened after a fork.
        """
        with self.lock:
            if self.backend is None:
                if self._inherited is None:
                    raise closed_error()
                if self.open_again is None:
                    raise PhregError(
                        "extract: this process was forked after the extractor had opened "
                        f"{self._inherited.name}, which a fork breaks. Load the bundle in the child, or start it by "
                        "multiprocessing.get_context('spawn')."
                    )
                self.backend = self.open_again()
            return self.backend

    def close(self) -> None:
        """Free the backend, unless it belongs to the parent process."""
        # Two threads may close at once.
        backend, self.backend, self._inherited = self.backend, None, None
        if backend is not None:
            backend.close()

    def forget(self) -> None:
        """Drop the parent's backend without freeing it, since that would wait for the parent's threads."""
        if self.backend is not None:
            # One reference more than there are names: the child never frees the backend, not even at its exit.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.backend))
            self._inherited, self.backend = self.backend, None
        # Another thread of the parent may have held the old lock.
        self.lock = threading.Lock()


_LIVING: weakref.WeakSet[ForkSafeBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for fork_safe in list(_LIVING):
        fork_safe.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
