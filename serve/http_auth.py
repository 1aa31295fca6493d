"""API keys: ``Authorization: Bearer KEY``, compared by their SHA-256 in constant time.

A request's tenant is its key's, whatever else the request says.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from excise.serve.http_errors import Failure
from excise.serve.http_settings import ServerSettings

#: Seconds that a wrong key waits for its answer, and how many may wait at the same time: beyond that they are told at
#: once to come back later. Those who wait hold a connection and a timer, no worker.
DELAY, WAITING = 0.25, 64

_OPEN = frozenset({"/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})


class ApiKeys:
    """Lets pass who sends one of the keys; before a byte of the body is read.

    Raises nothing: it answers 401, or 429 where too many wrong keys arrive.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._digests, self._tenants = app, settings.api_key_digests, settings.api_key_tenants
        self._open = _OPEN | ({"/metrics"} if settings.open_metrics else set())
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        digest = matching(Headers(scope=scope).get("authorization", ""), self._digests)
        if digest is not None:
            state = scope.setdefault("state", {})
            state["key"] = digest[:12]
            # Looked up once the key is known: how long that takes says nothing about other keys.
            if (tenant := self._tenants.get(digest)) is not None:
                state["tenant"] = tenant
            await self._app(scope, receive, send)
            return
        await (await self._refused()).response(scope["path"])(scope, receive, send)

    async def _refused(self) -> Failure:
        if self._waiting >= WAITING:
            return Failure(429, "too_many_wrong_keys", "too many wrong keys at once", headers={"retry-after": "1"})
        self._waiting += 1
        try:
            await asyncio.sleep(DELAY)
        finally:
            self._waiting -= 1
        return Failure(
            401,
            "invalid_api_key",
            "this server needs a key of its own: send the header Authorization: Bearer KEY",
            headers={"www-authenticate": "Bearer"},
        )


def matching(authorization: str, digests: Collection[str]) -> str | None:
    """The digest of the key in a header, if it is one of ``digests``: all are compared, whichever it is."""
    scheme, _, key = authorization.partition(" ")
    sent = hashlib.sha256(key.strip().encode()).hexdigest()
    found = None
    for digest in digests:
        if hmac.compare_digest(sent, digest):
            found = digest
    return found if scheme.lower() == "bearer" else None
