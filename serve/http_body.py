"""Request bodies: whole, in time, and no larger than allowed, before a route sees them."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from excise.serve.http_errors import ClientLeft, RequestRefused
from excise.serve.http_settings import ServerSettings


class BodyLimit:
    """Reads each body up to the limit and hands it on in one piece.

    Raises:
        RequestRefused: 413 for a body that is too large, which is known from its length or once the limit is passed:
            nothing more of it is read; 408 for one that isn't there in time; 415 for a compressed one.
        ClientLeft: The connection was closed before the end.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._limit, self._timeout = app, settings.max_body_bytes, settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length")
        if length is not None and length.isdecimal() and int(length[:20]) > self._limit:
            raise self._too_large()
        if (encoding := headers.get("content-encoding", "identity")) != "identity":
            raise RequestRefused(
                f"content-encoding {encoding[:20]!r} isn't read here: send the body as it is",
                status=415,
                code="unsupported_encoding",
            )
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._whole(receive)
        except TimeoutError as error:
            raise RequestRefused(
                f"the body didn't arrive within {self._timeout:g} s",
                status=408,
                code="body_timeout",
                headers={"connection": "close"},
            ) from error
        handed = False

        async def replay() -> Message:
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _whole(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft("the client closed the connection before the end of its request")
            body += message.get("body", b"")
            if len(body) > self._limit:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> RequestRefused:
        return RequestRefused(
            f"the body has more than {self._limit} bytes, the limit here",
            status=413,
            code="body_too_large",
            headers={"connection": "close"},
        )
