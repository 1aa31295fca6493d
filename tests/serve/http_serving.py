"""The application on a real port, with the options that excise runs uvicorn with."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from excise.serve.http_app import create_app
from excise.serve.http_protocol import uvicorn_options
from excise.serve.http_settings import ServerSettings
from tests.serve.fake_engine import FakeEngine


@contextlib.contextmanager
def serving(engine: FakeEngine, settings: ServerSettings | None = None, **options: Any) -> Iterator[str]:
    """A server's address; ``options`` are ``create_app``'s."""
    settings = settings or ServerSettings()
    app = create_app(engine, settings, **options)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", **uvicorn_options(settings))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


@contextlib.asynccontextmanager
async def client_of(app: FastAPI, **options: Any) -> Any:
    """A client of the application in this event loop, started and warmed up."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://excise", **options) as client:
            yield client


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.005)
