"""``serve``: load bundles, listen, and stop gracefully."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.serving.app import create_app
from phreg_deploy.serving.gate import Gate
from phreg_deploy.serving.limits import ServiceLimits
from phreg_deploy.serving.requests.access import VARIABLE, TokenCheck
from phreg_deploy.serving.service import Service
from phreg_deploy.spec import Stored

# Seconds for connections to close after the last answer.
CLOSING = 5
# Seconds for which an idle connection stays open. Proxies use theirs again for 60 s, and a closed one fails a request.
KEPT_OPEN = 75


@dataclass(frozen=True)
class Address:
    """Where a service listens. ``reuse_port``: several processes share the port, and the system spreads connections.

    ``open``: serve other machines without a token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    reuse_port: bool = False
    open: bool = False

    def check(self, token: str | None) -> None:
        """Raise ``PhregError`` for an address that other machines reach, without a token."""
        if token is None and not self.open and not _is_loopback(self.host):
            raise PhregError(
                f"serve: got the host {self.host}, which other machines reach, and no token. Set {VARIABLE}, give "
                "--token-file, or add --open to serve everyone."
            )

    def bind(self) -> socket.socket:
        """Take the address. Raises ``PhregError`` if that is not possible."""
        listener = None
        if self.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
            raise PhregError("serve: got --reuse-port, which this system does not have; leave it out.")
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self.reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((self.host, self.port))
        # A name that is no name of a host is a UnicodeError.
        except (OSError, OverflowError, UnicodeError) as error:
            if listener is not None:
                listener.close()
            why = getattr(error, "strerror", None) or error
            raise PhregError(
                f"serve: {self.host}:{self.port} cannot be listened on ({why}); choose another --host or --port."
            ) from None
        return listener


@dataclass(frozen=True)
class ServiceReport(Stored):
    """What a service did in ``seconds``, as numbers of requests with an image.

    ``accepted``: those that were not refused at once. ``answers``: how many of all got each status. ``unfinished``:
    accepted ones that were not answered when it ended.
    """

    seconds: float
    accepted: int
    answers: dict[str, int]
    unfinished: int


class GracefulServer(uvicorn.Server):
    """Stops after the requests that it accepted. A second signal stops it at once."""

    def __init__(self, config: uvicorn.Config, gate: Callable[[], Gate], limits: ServiceLimits) -> None:
        super().__init__(config)
        self._gate, self._limits, self._since = gate, limits, 0.0
        self.unfinished = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests from now on. uvicorn's own would raise the signal again at the end, and exit with it."""
        if self._since:
            self.should_exit = self.force_exit = True
            return
        self._since = time.monotonic()
        self._gate().stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether the last answer has been sent."""
        if self._since and not self.should_exit:
            waited, active = time.monotonic() - self._since, self._gate().active
            if (active == 0 and waited >= self._limits.drain) or waited >= self._limits.drain + self._limits.stop:
                self.unfinished, self.should_exit = active, True
        return bool(await super().on_tick(counter))


def serve(
    bundles: Mapping[str, Path | str],
    *,
    backend: str = "auto",
    address: Address = Address(),
    limits: ServiceLimits = ServiceLimits(),  # noqa: B008
    token: str | None = None,
    access_log: bool = False,
    show: Callable[[str, dict[str, FeatureExtractor]], None] = lambda _url, _extractors: None,
    **tuning: Any,
) -> ServiceReport:
    """Serve bundles by name until SIGTERM or SIGINT; then finish what was accepted, and refuse the rest with 503.

    Args:
        backend, tuning: of ``FeatureExtractor.load``.
        token: that every request must carry; None for none. See ``access.read_token``.
        show: is called with the address and the extractors when the service listens.

    Raises:
        PhregError: as ``FeatureExtractor.load``; an address that cannot be listened on, or one that needs a token.
    """
    address.check(token)
    # Of odd metadata in what clients send. Filters are the whole process's: to change them in a request is a race.
    warnings.filterwarnings("ignore", module="PIL")
    listener = address.bind()
    with ExitStack() as stack:
        stack.callback(listener.close)
        extractors: dict[str, FeatureExtractor] = {}
        for name, path in bundles.items():
            extractors[name] = stack.enter_context(FeatureExtractor.load(path, backend, **tuning))
        service = Service(extractors, limits)
        stack.callback(service.close)
        for model in service.models.values():
            model.warm()
        app = create_app(service, None if token is None else TokenCheck(token))
        # Builds the middleware, which the signal handler needs before the first request.
        app.middleware_stack = app.build_middleware_stack()
        config = uvicorn.Config(
            app,
            log_level="info" if access_log else "warning",
            access_log=access_log,
            server_header=False,
            timeout_keep_alive=KEPT_OPEN,
            timeout_graceful_shutdown=CLOSING,
            lifespan="off",
        )
        server, started = GracefulServer(config, lambda: app.state.gate, limits), time.monotonic()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        listener.listen()
        show(f"http://{shown}:{port}", extractors)
        asyncio.run(server.serve([listener]))
        gate: Gate = app.state.gate
        answers = {str(status): count for status, count in sorted(gate.answers.items())}
        return ServiceReport(time.monotonic() - started, gate.accepted, answers, server.unfinished)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
