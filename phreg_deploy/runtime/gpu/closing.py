"""A base class that closes itself at the end of ``with``."""

from __future__ import annotations

from typing import TypeVar

C = TypeVar("C", bound="Closing")


class Closing:
    """Calls ``close`` at the end of ``with``; contextlib's own base class leaves that to each subclass."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
