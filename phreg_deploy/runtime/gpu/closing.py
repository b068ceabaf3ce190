"""A base class that closes itself at the end of ``with``, the closing of several things, and of things in use."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from phreg_deploy.errors import PhregError, closed_error

C = TypeVar("C", bound="Closing")


class Closing:
    """Calls ``close`` at the end of ``with``; contextlib's own base class leaves that to each subclass."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Calls:
    """The calls in progress of something that several threads use: closing it must free nothing under a call."""

    def __init__(self) -> None:
        self._closed, self._process = False, os.getpid()
        self._changed = threading.Condition()
        # Thread -> its calls, which may be one inside the other.
        self._inside = Counter[int]()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count a call, which is the block. Raises ``PhregError`` after ``end``."""
        thread = threading.get_ident()
        with self._changed:
            if self._closed:
                raise closed_error()
            self._inside[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[thread] -= 1
                if not self._inside[thread]:
                    del self._inside[thread]
                    self._changed.notify_all()

    def end(self) -> bool:
        """Refuse new calls, and wait for those of other threads; False if another call of ``end`` did."""
        if os.getpid() != self._process:
            # A forked child does not have the threads of its parent.
            closed, self._closed = self._closed, True
            return not closed
        with self._changed:
            if self._closed:
                return False
            self._closed = True
            own = {threading.get_ident()}
            self._changed.wait_for(lambda: self._inside.keys() <= own)
        return True


def close_all(things: Iterable[Closing]) -> None:
    """Close all of them, also after an error; then raise the first error."""
    failed: PhregError | None = None
    for thing in things:
        try:
            thing.close()
        except PhregError as error:
            failed = failed or error
    if failed is not None:
        raise failed
