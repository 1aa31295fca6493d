"""Whether the server lives, and whether it is to be sent requests: ``/healthz`` and ``/readyz``.

It is ready once one image has been made, so that no client waits for a model's first call, and until it drains. It
answers requests before that, too.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from excise.errors import ExciseError, NotServed, QueueFull
from excise.serve.engine import Engine, ImageRequest
from excise.serve.http_access import SERVER, log_failure, log_line
from excise.serve.http_errors import OPENAI_ERRORS, Failure, json_response
from excise.serve.http_metrics import Metrics
from excise.serve.http_settings import ServerSettings
from excise.serve.runtime import Request


class Readiness:
    """Warm-up and draining of one application."""

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: Metrics) -> None:
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self.warm = self.draining = False
        self.problem: str | None = None  #: why the warm-up failed

    @property
    def ready(self) -> bool:
        """Whether the server is to be sent requests."""
        return self.warm and not self.draining

    def start(self) -> None:
        """The application starts, perhaps not for the first time."""
        self.draining, self.problem = False, None

    def drain(self) -> None:
        """Take no more requests; those that are under way are finished. From any thread, and once is enough."""
        self.draining = True
        self._metrics.ready(False)

    def failure(self) -> Failure:
        """Why it isn't ready."""
        wait = {"retry-after": str(self._settings.drain_retry_after if self.draining else 1)}
        if self.draining:
            return Failure(503, "draining", "the server is shutting down", headers=wait)
        if self.problem is not None:
            return Failure(503, "warm_up_failed", f"the first image failed: {self.problem}")
        return Failure(503, "warming_up", "the first image isn't done yet", headers=wait)

    async def warm_up(self) -> None:
        """Make one image and throw it away; a model that can't is never ready, and its error is in the log."""
        steps = min(self._settings.warm_up_steps, self._settings.max_steps)
        wanted = ImageRequest(
            Request("", edit=self._engine.served.edits[0].id), steps, self._settings.default_guidance_scale
        )
        while not self.draining:
            try:
                job = self._engine.submit(wanted)
                try:
                    await asyncio.shield(asyncio.wrap_future(job.future))
                finally:
                    job.cancel()
            except QueueFull as error:
                await asyncio.sleep(error.retry_after)
            except NotServed as error:
                self.problem = str(error)
                return
            except Exception as error:
                # What an error of the model says may hold paths: for the operator, not for whoever asks.
                self.problem = str(error) if isinstance(error, ExciseError) else type(error).__name__
                log_failure(error, "warm-up", log_prompts=True)
                return
            else:
                self.warm = True
                self._metrics.ready(self.ready)
                log_line(SERVER, {"ready": self._engine.served.model, "edit_id": self._engine.served.edits[0].id})
                return


def health_router(readiness: Readiness) -> APIRouter:
    """``/healthz`` and ``/readyz``, for GET and HEAD."""
    router = APIRouter(tags=["health"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", summary="The process answers")
    async def live() -> Response:
        return json_response({"status": "ok"})

    @router.head("/readyz", include_in_schema=False)
    @router.get(
        "/readyz", summary="The model has made an image, and the server isn't draining", responses=OPENAI_ERRORS
    )
    async def ready() -> Response:
        return json_response({"status": "ready"}) if readiness.ready else readiness.failure().response("/readyz")

    return router
