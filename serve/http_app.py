"""The embedded server's application: all protocols on one engine.

    CORS (only if asked for) → access log, metrics, errors → API keys → bodies → routes

``app.state.readiness.drain()`` makes ``/readyz`` fail and refuses new images, so that a load balancer can turn away
before the engine is drained and the socket closed. The engine is its owner's to drain and close.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from excise import __version__
from excise.serve.audit_log import AuditLog
from excise.serve.engine import Engine
from excise.serve.http_access import Access
from excise.serve.http_auth import ApiKeys
from excise.serve.http_body import BodyLimit
from excise.serve.http_generation import Generator
from excise.serve.http_health import Readiness, health_router
from excise.serve.http_kserve import kserve_router
from excise.serve.http_metrics import Metrics, metrics_router
from excise.serve.http_models import TenantModels
from excise.serve.http_openai import openai_router
from excise.serve.http_settings import ServerSettings
from excise.serve.output_filter import NudeNetFilter, OutputFilter

#: The page may run its own script and style and ask this server; nothing comes from, or goes, anywhere else.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    engine: Engine,
    settings: ServerSettings | None = None,
    *,
    page: str | None = None,
    output_filter: OutputFilter | None = None,
) -> FastAPI:
    """The application, for uvicorn with ``http_protocol.uvicorn_options``.

    Args:
        engine: What makes the images.
        settings: The operator's; the defaults without.
        page: An HTML document for ``/``, with its script and style inside; without, ``/`` leads to ``/openapi.json``.
        output_filter: In place of NudeNet's, where ``settings.output_filter`` asks for one.

    Raises:
        UsageError: ``settings.policy`` names an edit that the engine doesn't serve.
        OutputError: The audit log can't be opened.
        MissingExtra: The output filter isn't installed.
    """
    settings = settings or ServerSettings()
    metrics = Metrics(engine)
    if settings.output_filter == "none":
        output_filter = None
    elif output_filter is None:
        output_filter = NudeNetFilter(score=settings.filter_score)
    audit = None if settings.audit_log is None else AuditLog(settings.audit_log)
    readiness = Readiness(engine, settings, metrics)
    models = TenantModels(engine.served, settings.policy)
    generator = Generator(
        engine,
        settings,
        metrics,
        audit=audit,
        output_filter=output_filter,
        draining=lambda: readiness.draining,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        readiness.start()
        warming = asyncio.create_task(readiness.warm_up())
        try:
            yield
        finally:
            readiness.drain()
            warming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await warming
            if audit is not None:
                audit.close()

    app = FastAPI(
        title="excise",
        version=__version__,
        description="Images of an edited diffusion model.",
        docs_url=None,  # FastAPI's page loads its script from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.readiness, app.state.metrics = readiness, metrics
    app.include_router(openai_router(generator, models))
    app.include_router(kserve_router(generator, models, readiness))
    app.include_router(health_router(readiness))
    app.include_router(metrics_router(metrics))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return RedirectResponse("/openapi.json")

    @app.get("/", include_in_schema=False)
    async def front() -> Response:
        if page is None:
            return RedirectResponse("/openapi.json")
        return Response(page, media_type="text/html", headers={"content-security-policy": PAGE_POLICY})

    @app.exception_handler(HTTPException)
    async def pass_on(_: Request, error: Exception) -> Response:
        raise error  # to the access log, which answers every error

    # The last one added is the outermost.
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(ApiKeys, settings=settings)
    app.add_middleware(Access, settings=settings, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", "x-request-timeout"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
