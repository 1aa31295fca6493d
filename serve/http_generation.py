"""From the images that a request wants to those that leave: queue, wait, filter, record.

Whatever ends a request, its jobs are cancelled and each of its images gets one line in the audit log and one count.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image as Pillow
from starlette.requests import Request as HttpRequest

from excise.errors import DeadlineExceeded, Draining
from excise.serve.audit_log import AuditLog
from excise.serve.engine import Engine, Image, ImageRequest, Job
from excise.serve.http_errors import ClientLeft, RequestRefused, failure_of
from excise.serve.http_limits import Wanted
from excise.serve.http_metrics import Metrics
from excise.serve.http_settings import ServerSettings
from excise.serve.output_filter import OutputFilter, Verdict, hidden
from excise.serve.runtime import Request

#: Seconds after its deadline at which a request is answered even if the engine hasn't said a word.
_GRACE = 1.0

#: zlib's: more makes files a few per cent smaller for several times the work.
_PNG_LEVEL = 3

#: Called in the event loop with (place of the image in the request, steps done, steps in all).
OnImageStep = Callable[[int, int, int], object]


@dataclass(frozen=True)
class Generated:
    """An image as it leaves."""

    image: Image
    wanted: Wanted
    verdict: Verdict | None  #: None without an output filter

    @property
    def flagged(self) -> bool:
        """Whether the output filter has blurred it."""
        return self.verdict is not None and self.verdict.flagged

    def png(self) -> bytes:
        """The file."""
        out = io.BytesIO()
        Pillow.fromarray(self.image).save(out, "PNG", compress_level=_PNG_LEVEL)
        return out.getvalue()


class Generator:
    """What all protocols ask for images."""

    def __init__(
        self,
        engine: Engine,
        settings: ServerSettings,
        metrics: Metrics,
        *,
        audit: AuditLog | None,
        output_filter: OutputFilter | None,
        draining: Callable[[], bool],
    ) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.audit, self.output_filter, self._draining = audit, output_filter, draining

    def begin(
        self,
        http: HttpRequest,
        wanted: Sequence[Wanted],
        *,
        protocol: str,
        deadline: float | None,
        on_step: OnImageStep | None = None,
    ) -> Generation:
        """Queue the images, all or none.

        Raises:
            QueueFull, Draining, UsageError: As ``Engine.submit``.
        """
        generation = Generation(self, http, wanted, protocol, deadline)
        loop = asyncio.get_running_loop()
        try:
            if self._draining():
                raise Draining("the server is shutting down: ask again in a moment")
            for place, one in enumerate(wanted):
                generation.jobs.append(
                    self.engine.submit(
                        ImageRequest(
                            Request(one.prompt, one.negative_prompt, one.seed, edit=one.edit.id),
                            one.steps,
                            one.guidance_scale,
                            deadline,
                        ),
                        on_step=None if on_step is None else _in_loop(loop, on_step, place),
                    )
                )
        except BaseException as error:
            generation.failed(error)
            raise
        return generation


class Generation:
    """The images of one request, on their way."""

    def __init__(
        self, generator: Generator, http: HttpRequest, wanted: Sequence[Wanted], protocol: str, deadline: float | None
    ) -> None:
        self._generator, self._http, self._wanted = generator, http, wanted
        self._protocol, self._deadline = protocol, deadline
        self.jobs: list[Job] = []

    async def finish(self) -> list[Generated]:
        """Wait for all of them; to be called once.

        Raises:
            ClientLeft: The connection was closed.
            DeadlineExceeded: One wasn't ready in time.
            RequestRefused: The output filter refuses one (``content_policy_violation``).
            OutputError: The audit log can't be written.
        """
        try:
            images = await self._images()
            generated = await asyncio.to_thread(self._judged, images)
        except BaseException as error:
            self.failed(error)
            raise
        refusing = self._generator.settings.output_filter == "refuse" and any(one.flagged for one in generated)
        for one in generated:
            shown = "blurred" if one.flagged else "done"
            self._record(one.wanted, "refused" if refusing else shown, 400 if refusing else 200, one.verdict)
        if refusing:
            raise RequestRefused(
                "the output filter doesn't let the image pass: change the prompt or the seed",
                code="content_policy_violation",
                param="prompt",
            )
        return generated

    def failed(self, error: BaseException) -> None:
        """Cancel what is under way and record that there will be no image."""
        for job in self.jobs:
            job.cancel()
        failure = failure_of(error)
        for one in self._wanted:
            # The error at hand is the one to be told.
            with contextlib.suppress(Exception):
                self._record(one, failure.code, failure.status, None)

    async def _images(self) -> list[Image]:
        # Shielded: only ``Job.cancel`` may cancel what the engine's thread is about to fill.
        images = asyncio.gather(*(asyncio.shield(asyncio.wrap_future(job.future)) for job in self.jobs))
        leaving = asyncio.ensure_future(_left(self._http))
        waited: set[asyncio.Future[Any]] = {images, leaving}
        patience = None if self._deadline is None else self._deadline + _GRACE
        try:
            done, _ = await asyncio.wait(waited, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if images in done:
                return list(images.result())
            if leaving in done:
                raise ClientLeft("the client closed the connection before its image was ready")
            raise DeadlineExceeded(f"the image wasn't ready within {self._deadline:g} s")
        finally:
            leaving.cancel()
            images.cancel()
            # Its outcome is known, or nobody's any more.
            images.add_done_callback(lambda one: one.cancelled() or one.exception())

    def _judged(self, images: Sequence[Image]) -> list[Generated]:
        output_filter = self._generator.output_filter
        if output_filter is None:
            return [Generated(image, one, None) for image, one in zip(images, self._wanted, strict=True)]
        verdicts = output_filter.verdicts(images)
        for verdict in verdicts:
            self._generator.metrics.judged(verdict.flagged)
        return [
            Generated(hidden(image, "blur") if verdict.flagged else image, one, verdict)
            for image, one, verdict in zip(images, self._wanted, verdicts, strict=True)
        ]

    def _record(self, one: Wanted, outcome: str, status: int, verdict: Verdict | None) -> None:
        self._generator.metrics.image(one.edit.name, outcome, one.steps)
        if self._generator.audit is None:
            return
        state = self._http.scope.get("state", {})
        prompts = {"prompt": one.prompt, "negative_prompt": one.negative_prompt}
        self._generator.audit.write(
            request_id=state.get("request_id"),
            key=state.get("key"),
            **({"tenant": state["tenant"]} if "tenant" in state else {}),
            protocol=self._protocol,
            model=self._generator.engine.served.model,
            edit=one.edit.name,
            edit_id=one.edit.id,
            seed=one.seed,
            steps=one.steps,
            guidance_scale=one.guidance_scale,
            verdict=None if verdict is None else ("flagged" if verdict.flagged else "passed"),
            outcome=outcome,
            status=status,
            **(prompts if self._generator.settings.log_prompts else {}),
        )


async def _left(http: HttpRequest) -> None:
    """Returns once the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _in_loop(loop: asyncio.AbstractEventLoop, on_step: OnImageStep, place: int) -> Callable[[int, int], object]:
    """``on_step`` for one image, called from the engine's thread."""

    def report(done: int, total: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(on_step, place, done, total)

    return report
