"""An engine without a model: deterministic images, at once or when the test says so."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from excise.errors import Draining, ExciseError, PromptTooLong
from excise.serve.engine import Failures, Image, ImageRequest, Load, OnJobStep, Served, ServedEdit

#: Height and width differ, so that a test sees them swapped.
SHAPE = (16, 24, 3)
WEAPONS, STYLE = "a1" * 32, "b2" * 32
LONGEST = 77


def image_of(request: ImageRequest) -> Image:
    """What the engine makes of a request: every value of it changes the image, and nothing else does."""
    asked = request.request
    key = (asked.prompt, asked.negative_prompt, asked.seed, asked.index, asked.edit)
    text = repr((*key, request.num_inference_steps, request.guidance_scale))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).integers(0, 256, SHAPE, np.uint8)


@dataclass
class FakeJob:
    """A job that the test finishes."""

    request: ImageRequest
    on_step: OnJobStep | None
    future: Future[Image] = field(default_factory=Future)
    cancelled: bool = False

    def cancel(self) -> None:
        if not self.future.done():
            self.cancelled = True
            self.future.cancel()

    def step(self, done: int) -> None:
        if self.on_step is not None:
            self.on_step(done, self.request.num_inference_steps)

    def finish(self) -> None:
        for done in range(1, self.request.num_inference_steps + 1):
            self.step(done)
        self.future.set_result(image_of(self.request))


class FakeEngine:
    """While ``hold`` is set, jobs wait for ``FakeJob.finish``; ``refusal`` is raised by ``submit``."""

    def __init__(self, *, hold: bool = False) -> None:
        self.hold = hold
        self.refusal: ExciseError | None = None
        self.error: Exception | None = None
        self.jobs: list[FakeJob] = []
        self.submitted = threading.Semaphore(0)
        self.draining = False
        self.served = Served(
            "tiny",
            (
                ServedEdit("weapons", WEAPONS, "erases weapons"),
                ServedEdit("style", STYLE, "erases a style"),
                ServedEdit("base", None, "the model as it was"),
            ),
            SHAPE,
            LONGEST,
            "c3" * 32,
            {"weapons": ("gun", "knife"), "style": ("a style",), "base": ()},
        )
        failed = Failures(model_error=4, deadline=3, cancelled=2)
        self.load = Load(waiting=3, running=2, steps=10, batched=25, seconds=1.5, failed=failed)

    def submit(self, request: ImageRequest, *, on_step: OnJobStep | None = None) -> FakeJob:
        if self.draining:
            raise Draining("the engine is draining")
        if self.refusal is not None:
            raise self.refusal
        if len(request.request.prompt.split()) > LONGEST:
            raise PromptTooLong(f"the prompt has more than {LONGEST} words")
        job = FakeJob(request, on_step)
        self.jobs.append(job)
        if self.error is not None:
            job.future.set_exception(self.error)
        elif not self.hold:
            job.finish()
        self.submitted.release()
        return job

    def drain(self, timeout: float | None = None) -> bool:
        self.draining = True
        return True

    def close(self) -> None:
        self.draining = True
