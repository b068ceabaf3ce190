"""The application of the service: its errors, its routes of facts, and those of ``image_routes``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from phreg_deploy import __version__
from phreg_deploy.serving.gate import Gate
from phreg_deploy.serving.image_routes import add_image_routes
from phreg_deploy.serving.requests.access import TokenCheck
from phreg_deploy.serving.requests.decoding import FORMATS
from phreg_deploy.serving.requests.refusals import Refused
from phreg_deploy.serving.service import Service


def create_app(service: Service, token: TokenCheck | None = None) -> FastAPI:
    """Make the ASGI application of a service, which it closes at its end; ``app.state.gate`` counts requests."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="phreg-deploy",
        version=__version__,
        summary="Clean dense features of images.",
        lifespan=lifespan,
        redoc_url=None,
        # Documents the token; ``Gate`` checks it.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [],
    )
    state = app.state

    def guarded(app: Any) -> Gate:
        state.gate = Gate(app, service.limits, service.metrics, token, service.capacity)
        return state.gate  # type: ignore[no-any-return]

    app.add_middleware(guarded)  # type: ignore[arg-type]
    _add_errors(app)
    add_image_routes(app, service)
    _add_facts(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(
            f"{part['loc'][-1]}: got {str(part['input'])[:60]!r}, {part['msg']}" for part in error.errors()
        )
        return JSONResponse({"detail": said}, 422)

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse(
            {"detail": "serve: this service failed; its log says why. Ask again, or tell its owner."}, 500
        )


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["health"], summary="Whether the process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", tags=["health"], summary="Whether images are served", responses={503: {}})
    @app.get("/health", tags=["health"], summary="The same", include_in_schema=False)
    async def ready() -> JSONResponse:
        """200 while images are served; 503 while the service stops, or after a run that failed until one succeeds.

        Load balancers send no images to a failing service, so this question lets it run an image of zeros.
        """
        gate: Gate = app.state.gate
        failing = [model for model in service.models.values() if not model.healthy]
        for model in failing:
            model.probe()
        status = "stopping" if gate.stopping else "failing" if failing else "ready"
        said = {"status": status, "failing": [model.name for model in failing], "active": gate.active}
        return JSONResponse(said, 200 if status == "ready" else 503)

    @app.get("/info", tags=["facts"], summary="Bundles and limits")
    async def info() -> dict[str, Any]:
        """What each bundle serves, from its manifest, and the limits of a request."""
        limits = service.limits
        bounds = {"bytes": limits.bytes, "pixels": limits.pixels, "seconds": limits.seconds, "queue": limits.queue}
        models = [model.facts() for model in service.models.values()]
        return {"version": __version__, "models": models, "limits": bounds, "formats": list(FORMATS)}

    @app.get("/metrics", tags=["facts"], summary="Metrics for Prometheus", response_class=Response)
    async def report() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
