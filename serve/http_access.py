"""Around every request: its id, its line in the access log, its metrics, and an answer to whatever went wrong.

A line names the request, never what it holds: no prompt, no query, no key, and of an unexpected error its type and
place but not its text, which may quote a prompt.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from excise.errors import ExciseError
from excise.serve.http_errors import failure_of, quoted
from excise.serve.http_metrics import UNMATCHED, Metrics
from excise.serve.http_settings import ServerSettings

ACCESS = logging.getLogger("excise.access")
SERVER = logging.getLogger("excise.server")

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Access:
    """The outermost layer. A client's ``x-request-id`` is kept if it is a plain word; every answer has one."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _ID.fullmatch(sent) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        code: str | None = None
        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            failure = failure_of(error, self._settings.drain_retry_after)
            code = failure.code
            if failure.status == 500:
                log_failure(error, request_id, self._settings.log_prompts)
            if not status:
                await failure.response(scope["path"])(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", UNMATCHED)
            self._metrics.answered(route, scope["method"], status or 499, seconds)
            client = scope.get("client")
            log_line(
                ACCESS,
                {
                    "request_id": request_id,
                    "client": client[0] if client else None,
                    "key": scope["state"].get("key"),
                    **({"tenant": scope["state"]["tenant"]} if "tenant" in scope["state"] else {}),
                    "method": quoted(scope["method"]),
                    "path": quoted(scope["path"]),
                    "status": status or 499,
                    "seconds": round(seconds, 6),
                    **({} if code is None else {"error": code}),
                },
            )


def log_failure(error: BaseException, request_id: str, log_prompts: bool) -> None:
    """One line on an error that isn't the client's: its type and where it was raised.

    Its text is left out where it may quote a prompt: excise's own errors that do are the client's, and not here.
    """
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    text = {"message": str(error)} if log_prompts or isinstance(error, ExciseError) else {}
    line = {"request_id": request_id, "failed": type(error).__name__, **text, "at": frames[-8:]}
    log_line(SERVER, line, logging.ERROR)


def log_line(logger: logging.Logger, fields: dict[str, Any], level: int = logging.INFO) -> None:
    """One JSON object, with the time in seconds since 1970."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", json.dumps({"time": round(time.time(), 3), **fields}))
