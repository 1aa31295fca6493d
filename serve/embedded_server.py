"""The embedded server's process, and how it ends.

The first SIGTERM or SIGINT drains: ``/readyz`` fails, new images are refused with 503, those that were taken are
finished and sent, then the socket is closed. What isn't finished after the drain's timeout gets 503. A second signal
ends the drain at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from excise.serve.engine import Engine
from excise.serve.http_protocol import uvicorn_options
from excise.serve.http_settings import ServerSettings
from excise.serve.listener import Tls

#: Seconds that answers have to leave, once nothing is being made any more.
_FLUSH = 5


class EmbeddedServer(uvicorn.Server):
    """One application on one engine, until a signal.

    Args:
        app: what ``create_app`` made of ``engine`` and ``settings``.
        drain_timeout: seconds that images have to be finished in, once a signal came.
        say: told what happens, one line each.
        ready: called once requests are answered.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        settings: ServerSettings,
        *,
        tls: Tls | None = None,
        drain_timeout: float = 30.0,
        say: Callable[[str], object] = lambda message: None,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        options = uvicorn_options(settings)
        if tls is not None:
            options |= {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=_FLUSH, **options))
        self._app, self._engine, self._drain_timeout, self._say, self._ready = app, engine, drain_timeout, say, ready
        self._draining: asyncio.Task[None] | None = None
        self.unfinished = 0  #: images that were taken and not made

    def run_until_signal(self, listener: socket.socket) -> None:
        """Answer requests until a signal, and end as the module says. ``unfinished`` is what was lost."""
        asyncio.run(self.serve(sockets=[listener]))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and tell that it is done."""
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which would end without draining the engine, and by the signal itself."""
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for one in signals:
            loop.add_signal_handler(one, self._signalled, one)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)

    def _signalled(self, number: signal.Signals) -> None:
        loop = asyncio.get_running_loop()
        if self._draining is not None:
            self._say(f"{number.name} again: ending at once")
            self._note_unfinished()
            loop.run_in_executor(None, self._engine.close)  # which ends the drain
            return
        load = self._engine.load
        under_way = load.waiting + load.running
        self._say(f"{number.name}: finishing {under_way} images within {self._drain_timeout:g} s, taking no more")
        self._app.state.readiness.drain()
        self._draining = loop.create_task(self._drain())

    async def _drain(self) -> None:
        if not await asyncio.to_thread(self._engine.drain, self._drain_timeout):
            self._note_unfinished()
        # Those that still wait hear of it before their connections are closed.
        await asyncio.to_thread(self._engine.close)
        self.should_exit = True

    def _note_unfinished(self) -> None:
        load = self._engine.load
        self.unfinished = max(self.unfinished, load.waiting + load.running)
