"""How uvicorn is to run the application: its HTTP/1.1 protocol, with bounds on connections that don't ask anything.

uvicorn closes a connection that idles between two requests, but waits for ever for the rest of a request's headers, and
for a first request: a client that sends a byte now and then would hold its connection. Bodies have their own time limit
(``http_body``). A reverse proxy may be stricter; it needn't be there.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from excise.serve.http_errors import Failure
from excise.serve.http_settings import ServerSettings

#: Bytes of a request's line and headers.
LARGEST_HEADERS = 16 << 10


def uvicorn_options(settings: ServerSettings) -> dict[str, Any]:
    """Arguments of ``uvicorn.Config`` beside the application, the address and TLS.

    No proxy's headers are believed, and uvicorn's own access log, which would hold queries, is off.
    """
    bounds = {"header_timeout": settings.header_timeout, "max_connections": settings.max_connections}
    return {
        "http": type("ExciseProtocol", (BoundedProtocol,), bounds),
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "log_config": None,
        "timeout_keep_alive": settings.keep_alive,
        "h11_max_incomplete_event_size": LARGEST_HEADERS,
    }


class BoundedProtocol(H11Protocol):
    """One connection. The bounds are ``ServerSettings``'."""

    header_timeout: ClassVar[float] = 10.0
    max_connections: ClassVar[int] = 1024
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_expecting()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What isn't HTTP is answered in the same shape as all other errors."""
        body = json.dumps(Failure(400, "invalid_http", "this isn't an HTTP request").document("")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        try:
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # an answer is under way already: all that can be done is to end the connection
        self.transport.close()

    def _expect_headers(self) -> None:
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.header_timeout, self.transport.abort)

    def _stop_expecting(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = None
