"""``Refused``: an answer other than 200, with a message that says what was got, what was expected and what to do."""

from __future__ import annotations

from phreg_deploy.errors import PhregError


class Refused(PhregError):
    """A request that is not served. ``status``: of HTTP. ``retry``: seconds after which to ask again, or None."""

    def __init__(self, status: int, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return {} if self.retry is None else {"retry-after": str(self.retry)}
