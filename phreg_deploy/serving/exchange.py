"""``Exchange``: one request and its answer, for a bounded time and only as long as the client stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from phreg_deploy.serving.requests.refusals import Refused

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
# Bytes of an answer that are handed to the connection at once: it then waits until the client has read those before.
PIECE = 1 << 18
# Seconds and bytes for which the body of a refused request is read and dropped: a client that still sends reads no
# answer, and sees a broken connection if this one is closed.
PATIENCE, MOST_DROPPED = 10.0, 256 << 20


class Exchange:
    """Runs an ASGI application for one request of HTTP, or refuses the request.

    ``status``: that of the answer; 0 until it begins, and for a client that hung up before.
    """

    def __init__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.status = 0
        self._scope, self._receive, self._send = scope, receive, send
        self._arrived, self._gone, self._ended = asyncio.Event(), False, False

    async def run(self, app: Callable[..., Awaitable[None]], seconds: float) -> None:
        """Run the application; cancel it when the client hangs up, or after ``seconds``.

        If nothing was sent by then, the answer is 408 if the body had not arrived, else 504. A client that has not read
        the whole answer by then is disconnected.
        """
        work = asyncio.ensure_future(app(self._scope, self._receive_body, self.send))
        leaving = asyncio.ensure_future(self._await_hang_up())
        try:
            await asyncio.wait((work, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self._ended:
                # The server reports the end of an answer as if the client had hung up.
                await asyncio.wait((work,))
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.wait((work, leaving))
        error = None if work.cancelled() else work.exception()
        if self._gone:
            return
        if error is not None:
            raise error
        if work.cancelled() and not self.status:
            await self.refuse(_late(seconds, self._arrived.is_set()))

    async def refuse(self, refused: Refused) -> None:
        """Answer with a refusal, and close the connection."""
        body = json.dumps({"detail": str(refused)}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= refused.headers | ({"www-authenticate": "Bearer"} if refused.status == 401 else {})
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})

    async def drop_body(self) -> None:
        """Read what the client still sends, at most ``MOST_DROPPED`` bytes and for ``PATIENCE`` seconds."""
        # A client that waits for "100 Continue" sends nothing.
        if b"100-continue" in dict(self._scope["headers"]).get(b"expect", b"").lower():
            return

        async def drop() -> None:
            read = 0
            while read <= MOST_DROPPED:
                message = await self._receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

        try:
            await asyncio.wait_for(drop(), PATIENCE)
        except (TimeoutError, asyncio.TimeoutError):
            return

    async def send(self, message: Any) -> None:
        """Send a message of ASGI, a long body in pieces."""
        self.status = message.get("status", self.status)
        body, more = memoryview(message.get("body", b"")), message.get("more_body", False)
        while len(body) > PIECE:
            await self._send({**message, "body": bytes(body[:PIECE]), "more_body": True})
            body = body[PIECE:]
        if message["type"] == "http.response.body":
            self._ended = not more
            message = {**message, "body": bytes(body)}
        await self._send(message)

    async def _receive_body(self) -> Any:
        message = await self._receive()
        self._gone = self._gone or message["type"] == "http.disconnect"
        if not message.get("more_body", False):
            self._arrived.set()
        return message

    async def _await_hang_up(self) -> None:
        # Until the body has arrived, the application itself reads what the client sends.
        await self._arrived.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = not self._ended


def _late(seconds: float, arrived: bool) -> Refused:
    if arrived:
        return Refused(504, f"serve: there was no answer within {seconds:g} s; the service is overloaded. Ask again.")
    return Refused(408, f"body: it had not arrived within {seconds:g} s; send it faster, or a smaller image.")
