"""A request's images as server-sent events: its progress first, then the images, or an error.

    event: image_generation.progress     {"type", "index", "step", "steps"}
    event: image_generation.completed    {"type", "index", "b64_json", "seed", …} for each image
    event: error                         {"error": {"message", "type", "code", "param"}}
    data: [DONE]

Source: OpenAI's API reference, "Image streaming"; WHATWG HTML, "Server-sent events". The progress events are excise's.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from excise.serve.http_errors import failure_of
from excise.serve.http_generation import Generated

#: Seconds of silence after which a comment keeps proxies from closing the connection.
QUIET = 15.0


class Events:
    """The events of one request.

    ``common`` is what every image of it says of itself; ``failed`` hears of an error before the client does.
    """

    def __init__(self, common: dict[str, Any], failed: Callable[[Exception], object]) -> None:
        self._common, self._failed = common, failed
        self._progress: asyncio.Queue[tuple[int, int, int] | None] = asyncio.Queue()

    def step(self, place: int, done: int, total: int) -> None:
        """A step is done: to be called in the event loop."""
        self._progress.put_nowait((place, done, total))

    def of(self, finishing: asyncio.Task[list[Generated]]) -> AsyncIterator[bytes]:
        """The events until ``finishing`` is done; it is cancelled if nobody reads them any more."""

        def finished(task: asyncio.Task[list[Generated]]) -> None:
            self._progress.put_nowait(None)
            if not task.cancelled():
                task.exception()  # asked for here, since nobody may be left to hear of it

        finishing.add_done_callback(finished)
        return self._events(finishing)

    async def _events(self, finishing: asyncio.Task[list[Generated]]) -> AsyncIterator[bytes]:
        try:
            while True:
                try:
                    step = await asyncio.wait_for(self._progress.get(), QUIET)
                except TimeoutError:
                    yield b": still working\n\n"
                    continue
                if step is None:
                    break
                place, done, total = step
                yield _event("image_generation.progress", {"index": place, "step": done, "steps": total})
            for place, one in enumerate(finishing.result()):
                png = await asyncio.to_thread(one.png)
                yield _event(
                    "image_generation.completed",
                    {
                        **self._common,
                        "created_at": self._common["created"],
                        "index": place,
                        "b64_json": base64.b64encode(png).decode(),
                        "seed": one.wanted.seed,
                        **({} if one.verdict is None else {"blurred": one.flagged}),
                    },
                )
        except Exception as error:
            self._failed(error)
            yield _event("error", failure_of(error).document(""))
        finally:
            finishing.cancel()
        yield b"data: [DONE]\n\n"


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
