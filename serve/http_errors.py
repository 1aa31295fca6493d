"""Every error of the embedded server as a status and one JSON object.

KServe's routes, below ``/v2``, answer ``{"error": "text"}``, as its protocol says. All others answer what OpenAI's
clients read: ``{"error": {"message", "type", "code", "param"}}``.

    400  a value that can't be used; ``content_policy_violation`` where the output filter refuses an image
    401  no key, or not one of the server's                403  an edit that the key's tenant may not choose
    404, 405  no such route, model or method
    408  the body came too slowly                          413, 415  the body is too large, or of another type
    429  the queue is full, with Retry-After               499  the client has left; nobody reads it
    503  draining, with Retry-After                        504  the deadline passed
    500  anything else, with nothing of what happened: that is in the log
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from excise.errors import DeadlineExceeded, Draining, NotServed, PromptTooLong, QueueFull, UsageError
from excise.printable import printable

#: How much of a client's own words an error repeats.
QUOTED = 60


class RequestRefused(UsageError):
    """A request that the server doesn't take as it is, with its HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


class ClientLeft(NotServed):
    """The client closed the connection before its images were ready."""


@dataclass(frozen=True)
class Failure:
    """An error, ready to be sent."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def document(self, path: str) -> dict[str, Any]:
        """What the client of a route reads."""
        if path == "/v2" or path.startswith("/v2/"):
            return {"error": self.message}
        return {"error": {"message": self.message, "type": self.type, "code": self.code, "param": self.param}}

    def response(self, path: str) -> Response:
        """The same as an answer."""
        return json_response(self.document(path), self.status, self.headers)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorDocument(BaseModel):
    """The one shape of errors outside KServe's routes."""

    error: ErrorDetail


class KServeError(BaseModel):
    """The shape of errors of KServe's routes."""

    error: str


#: For the OpenAPI document of a route.
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorDocument, "description": "The request can't be carried out as it is."},
    "5XX": {"model": ErrorDocument, "description": "The server can't carry it out, or not now."},
}
KSERVE_ERRORS: dict[int | str, dict[str, Any]] = {
    key: {**entry, "model": KServeError} for key, entry in OPENAI_ERRORS.items()
}


def failure_of(error: BaseException, retry_after: int = 10) -> Failure:
    """What the client hears of an error; ``retry_after`` is what a draining server says, in seconds."""
    if isinstance(error, RequestRefused):
        return Failure(error.status, error.code, str(error), error.param, error.headers)
    if isinstance(error, PromptTooLong):
        return Failure(400, "prompt_too_long", str(error), "prompt")
    if isinstance(error, UsageError):
        return Failure(400, "invalid_value", str(error))
    if isinstance(error, QueueFull):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return Failure(429, "queue_full", str(error), headers={"retry-after": seconds})
    if isinstance(error, DeadlineExceeded):
        return Failure(504, "deadline_exceeded", str(error))
    if isinstance(error, Draining):
        return Failure(503, "draining", str(error), headers={"retry-after": str(retry_after)})
    if isinstance(error, ClientLeft | asyncio.CancelledError):
        return Failure(499, "client_left", "the client closed the connection")
    if isinstance(error, CancelledError):
        return Failure(503, "cancelled", "the image was cancelled: ask again", headers={"retry-after": "1"})
    if isinstance(error, HTTPException):
        return _of_framework(error)
    return Failure(500, "internal_error", "the server failed: its log has more under this answer's x-request-id")


def refused_by(error: ValidationError) -> RequestRefused:
    """The first thing that a body's schema doesn't allow, without repeating the body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestRefused(f"the body isn't JSON: {first['msg']}", code="invalid_json")
    place = ".".join(quoted(part) for part in first["loc"])
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        return RequestRefused(f"{place} isn't known here: leave it out", code="unknown_parameter", param=place)
    return RequestRefused(f"{place}: {message}" if place else message, param=place or None)


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, so that any text can be sent, and without NaN, which isn't JSON."""
    return Response(
        json.dumps(document, allow_nan=False, separators=(",", ":")),
        status,
        {"cache-control": "no-store", **(headers or {})},
        media_type="application/json",
    )


def quoted(value: object) -> str:
    """A client's own word, short and on one line."""
    try:
        text = printable(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= QUOTED else text[:QUOTED] + "…"


def _of_framework(error: HTTPException) -> Failure:
    """Of the routing: no such path or method."""
    codes = {404: "not_found", 405: "method_not_allowed"}
    words = {
        404: "there is nothing at this address: see /openapi.json",
        405: f"this address doesn't take that method: use {(error.headers or {}).get('allow', 'another')}",
    }
    return Failure(
        error.status_code,
        codes.get(error.status_code, "refused"),
        words.get(error.status_code, str(error.detail)),
        headers={name.lower(): value for name, value in (error.headers or {}).items()},
    )
