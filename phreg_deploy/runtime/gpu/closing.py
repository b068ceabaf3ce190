"""``with`` for anything that has ``close``."""

from __future__ import annotations

from types import TracebackType


class Closing:
    """``with`` for anything that has ``close``."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
