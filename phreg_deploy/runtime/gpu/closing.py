"""A base class that closes itself at the end of ``with``, and the closing of several things."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from phreg_deploy.errors import PhregError

C = TypeVar("C", bound="Closing")


class Closing:
    """Calls ``close`` at the end of ``with``; contextlib's own base class leaves that to each subclass."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
