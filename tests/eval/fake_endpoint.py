"""A server to test clients against: it answers as it was told, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What to answer a request with."""

    body: Any = b""  #: bytes, or what JSON can hold
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False  #: end the connection half-way through the body


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeEndpoint:
    """A running server."""

    url: str
    asked: list[Asked]


@contextmanager
def fake_endpoint(answer: Callable[[Asked], Answer]) -> Iterator[FakeEndpoint]:
    """A server on this machine that answers every request by ``answer``."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("GET", None)

        def do_POST(self) -> None:
            self._answer("POST", json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _answer(self, method: str, body: Any) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked.append(Asked(method, self.path, headers, body))
            given = answer(asked[-1])
            content = given.body if isinstance(given.body, bytes) else json.dumps(given.body).encode()
            kind = "application/octet-stream" if isinstance(given.body, bytes) else "application/json"
            try:
                self.send_response(given.status)
                for name, value in {
                    "content-type": kind,
                    "content-length": str(len(content)),
                    **given.headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if given.cut else content)
            except ConnectionError:
                given.cut = True  # the client has left: a time-out
            self.close_connection = given.cut

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield FakeEndpoint(f"http://127.0.0.1:{server.server_address[1]}", asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
