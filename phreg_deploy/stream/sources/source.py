"""``Source``: where frames come from."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """A source of frames, read by one thread.

    ``live``: it does not wait for its reader, as a camera. ``fps``: frames per second, or None if unknown. ``color``:
    the channel order of its arrays, or None for the extractor's.
    """

    live: bool
    fps: float | None
    color: str | None

    def read(self) -> Any:
        """The next frame, as an extractor takes images; None at the end, or when a camera is lost."""

    def close(self) -> None:
        """Free the device or file."""
