"""``Gate``: decides about a request before its body is read, bounds its time, and counts it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from phreg_deploy.serving.limits import ServiceLimits
from phreg_deploy.serving.metrics import Metrics
from phreg_deploy.serving.requests.access import TokenCheck
from phreg_deploy.serving.requests.refusals import Refused

# Answered without a token: what load balancers ask, and the description of the service, which names no bundle.
OPEN = ("/health", "/health/live", "/health/ready", "/openapi.json", "/docs")
# Seconds for which the body of a refused request is read and dropped: a client that still sends reads no answer.
PATIENCE = 5.0


class Gate:
    """ASGI middleware around the whole service.

    It refuses without a valid token (401), while the service stops (503), and beyond ``capacity`` requests at a time
    (503); it ends a request after ``limits.seconds`` (408 if its body had not arrived, else 504). ``active``: requests
    with an image that were accepted and are not answered yet; ``accepted`` and ``answers`` (by status) count them.
    """

    def __init__(
        self, app: Any, limits: ServiceLimits, metrics: Metrics, token: TokenCheck | None, capacity: int
    ) -> None:
        self.app, self.limits, self.metrics, self.token, self.capacity = app, limits, metrics, token, capacity
        self.active, self.accepted, self.stopping = 0, 0, False
        self.answers: Counter[int] = Counter()
        metrics.active.set_function(lambda: self.active)
        metrics.ready.set_function(lambda: float(not self.stopping))

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        loads = scope["method"] == "POST"
        refused = self._judge(scope)
        try:
            if refused is not None:
                await _drop_body(scope, receive, self.limits.bytes)
                await _answer(counted, refused)
                return
            self.active += loads
            self.accepted += loads
            try:
                await self._timed(scope, receive, counted, lambda: status > 0)
            except Exception:
                # The answer is made outside.
                status = status or 500
                raise
            finally:
                self.active -= loads
        finally:
            route = getattr(scope.get("route"), "path", "refused" if refused else "other")
            self.metrics.requests.labels(route, status or 499).inc()
            if loads:
                self.answers[status or 499] += 1

    def _judge(self, scope: Any) -> Refused | None:
        given = dict(scope["headers"])
        if self.token is not None and scope["path"] not in OPEN and not self.token.passes(given.get(b"authorization")):
            return Refused(401, "token: it is missing or wrong; expected the header 'Authorization: Bearer TOKEN'.")
        if scope["method"] != "POST":
            return None
        if self.stopping:
            return Refused(503, "serve: this service is stopping; ask again, another one will answer.", retry=1)
        if self.active >= self.capacity:
            return Refused(
                503, f"serve: {self.active} requests are being served already; ask again in a second.", retry=1
            )
        declared = given.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limits.bytes:
            from phreg_deploy.serving.requests.uploads import too_large

            return too_large(self.limits.bytes)
        return None

    async def _timed(
        self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any], began: Callable[[], bool]
    ) -> None:
        arrived = False

        async def watched() -> Any:
            nonlocal arrived
            message = await receive()
            arrived = arrived or not message.get("more_body", False)
            return message

        try:
            await asyncio.wait_for(self.app(scope, watched, send), self.limits.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            if began():
                # Half an answer cannot be taken back; the connection is closed.
                raise
            seconds = f"{self.limits.seconds:g} s"
            if arrived:
                late = Refused(
                    504, f"serve: there was no answer within {seconds}; the service is overloaded. Ask again."
                )
            else:
                late = Refused(408, f"body: it had not arrived within {seconds}; send it faster, or a smaller image.")
            await _answer(send, late)


async def _drop_body(scope: Any, receive: Callable[[], Any], limit: int) -> None:
    """Read what a refused client still sends; one that waits for "100 Continue" sends nothing."""
    if scope["method"] != "POST" or b"100-continue" in dict(scope["headers"]).get(b"expect", b"").lower():
        return

    async def drop() -> None:
        read = 0
        while read <= limit:
            message = await receive()
            read += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(drop(), PATIENCE)
    except (TimeoutError, asyncio.TimeoutError):
        return


async def _answer(send: Callable[[Any], Any], refused: Refused) -> None:
    body = json.dumps({"detail": str(refused)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= refused.headers | ({"www-authenticate": "Bearer"} if refused.status == 401 else {})
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
