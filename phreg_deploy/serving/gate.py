"""``Gate``: decides about a request before its body is read, and counts it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from phreg_deploy.serving.exchange import Exchange, Receive, Send
from phreg_deploy.serving.limits import ServiceLimits
from phreg_deploy.serving.metrics import Metrics
from phreg_deploy.serving.requests.access import TokenCheck
from phreg_deploy.serving.requests.refusals import Refused
from phreg_deploy.serving.requests.uploads import too_large

# Answered without a token: what load balancers ask, and the description of the service, which names no bundle.
OPEN = ("/health", "/health/live", "/health/ready", "/openapi.json", "/docs")
# Counted for a client that hung up before its answer began, as nginx does.
HUNG_UP = 499


class Gate:
    """ASGI middleware around the whole service.

    It refuses without a valid token (401), while the service stops (503), beyond ``capacity`` requests at a time (503),
    and a body that declares too many bytes (413). ``Exchange`` bounds the time of the others.

    ``active``: requests with an image that were accepted and are not answered yet. ``accepted`` and ``answers`` (by
    status) count requests with an image.
    """

    def __init__(
        self, app: Any, limits: ServiceLimits, metrics: Metrics, token: TokenCheck | None, capacity: int
    ) -> None:
        self.app, self.limits, self.metrics, self.token, self.capacity = app, limits, metrics, token, capacity
        self.active, self.accepted, self.stopping = 0, 0, False
        self.answers: Counter[int] = Counter()
        metrics.active.set_function(lambda: self.active)
        metrics.ready.set_function(lambda: float(not self.stopping))

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_image = scope["method"] == "POST"
        exchange, refused, failed = Exchange(scope, receive, send), self._judge(scope), False
        try:
            if refused is None:
                await self._accept(exchange, has_image)
            else:
                if has_image:
                    await exchange.drop_body()
                await exchange.refuse(refused)
        except Exception:
            # The answer is made outside.
            failed = True
            raise
        finally:
            route = getattr(scope.get("route"), "path", "refused" if refused else "other")
            status = exchange.status or (500 if failed else HUNG_UP)
            self.metrics.requests.labels(route, status).inc()
            if has_image:
                self.answers[status] += 1

    async def _accept(self, exchange: Exchange, has_image: bool) -> None:
        self.active += has_image
        self.accepted += has_image
        try:
            await exchange.run(self.app, self.limits.seconds)
        finally:
            self.active -= has_image

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
        return too_large(self.limits.bytes) if declared.isdigit() and int(declared) > self.limits.bytes else None
