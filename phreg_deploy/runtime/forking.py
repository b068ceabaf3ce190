"""A backend that outlives a fork: a forked child has neither the threads nor the GPU context that its parent opened.

Without this a call in the child waits for threads that are not there, for instance OpenVINO's in throughput mode.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.backends.interface import Backend


class ForkSafeBackend:
    """``backend`` until it is closed; in a forked child None until ``reopened``.

    ``lock``: a new one after a fork. ``again``: opens the same backend once more; None where that is not possible after a fork, as on a GPU.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend: Backend | None = backend
        self.again: Callable[[], Backend] | None = None
        self._inherited: Backend | None = None
        self.lock = threading.Lock()
        _LIVING.add(self)

    def reopened(self) -> Backend:
        """The backend, opened again in a forked child.

        Raises:
            PhregError: it was closed, or cannot be opened after a fork.
        """
        with self.lock:
            if self.backend is None:
                if self._inherited is None:
                    raise PhregError("extract: this FeatureExtractor was closed; load the bundle again.")
                if self.again is None:
                    raise PhregError(
                        f"extract: this process was forked after the extractor had opened {self._inherited.name}, which a fork breaks. "
                        "Load the bundle in the child, or start it by multiprocessing.get_context('spawn')."
                    )
                self.backend = self.again()
            return self.backend

    def close(self) -> None:
        """Free the backend, unless it is the parent's."""
        if self.backend is not None:
            self.backend.close()
        self.backend = self._inherited = None

    def forget(self) -> None:
        """Let go of the parent's backend without freeing it, which would wait for its threads."""
        if self.backend is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.backend))  # nothing frees it, the child's exit included
            self._inherited, self.backend = self.backend, None
        self.lock = threading.Lock()  # another thread of the parent may have held it


_LIVING: weakref.WeakSet[ForkSafeBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for held in list(_LIVING):
        held.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
