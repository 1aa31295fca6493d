"""What the embedded server's protocols need of whatever makes its images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from excise.errors import DeadlineExceeded, Draining, ExciseError
from excise.serve.runtime import Request

#: uint8 with shape (height, width, 3).
Image = npt.NDArray[np.uint8]

#: Called from the engine's thread after each denoising step with (steps done, steps in all).
OnJobStep = Callable[[int, int], object]


@dataclass(frozen=True)
class ImageRequest:
    """One image that is asked for.

    ``request.edit`` is the id of the edit, or None for the model as it is loaded: names are the protocol's matter.
    ``deadline`` is in seconds from ``submit``; None waits as long as it takes.
    """

    request: Request
    num_inference_steps: int
    guidance_scale: float
    deadline: float | None = None


class Job(Protocol):
    """An image on its way."""

    @property
    def future(self) -> Future[Image]:
        """The image, or an error of ``excise.errors``; ``CancelledError`` once ``cancel`` was called."""
        ...

    def cancel(self) -> None:
        """Nobody waits for it any more: what isn't denoised yet won't be. Of a finished job it does nothing."""
        ...


@dataclass(frozen=True)
class ServedEdit:
    """One choice of a request's ``edit``: the ``id`` of an edit, None for the base; ``name`` is unique and a slug."""

    name: str
    id: str | None
    summary: str


@dataclass(frozen=True)
class Served:
    """What an engine serves.

    ``edits`` are the choices that requests have, the first of which is the default; a model that carries one edit, or
    none, has just that one. ``concepts`` are what each edit erases, by the edit's name.
    """

    model: str  #: a slug, such as the folder's name
    edits: tuple[ServedEdit, ...]
    image_shape: tuple[int, int, int]  #: height, width, 3
    max_prompt_tokens: int
    manifest: str | None  #: SHA-256 of the folder's ``excise.json``
    concepts: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Failures:
    """Images that were taken and not made, each counted once, by the reason."""

    model_error: int = 0  #: the model raised an error, or gave what is no image
    deadline: int = 0  #: it wasn't ready in time
    cancelled: int = 0  #: nobody waited for it any more
    stopped: int = 0  #: the engine was closed before it was done


def failure_reason(job: Job, outcome: Image | ExciseError) -> str | None:
    """Which of ``Failures`` a job is that was finished with ``outcome``; None for an image that somebody waited for."""
    if job.future.cancelled():  # before it was finished: from then on it can't be
        return "cancelled"
    if not isinstance(outcome, ExciseError):
        return None
    if isinstance(outcome, DeadlineExceeded):
        return "deadline"
    return "stopped" if isinstance(outcome, Draining) else "model_error"


@dataclass(frozen=True)
class Load:
    """How busy an engine is, and what it couldn't make: for metrics and ``Retry-After``."""

    waiting: int
    running: int
    steps: int  #: UNet calls so far
    batched: int  #: images in those calls, so that batched / steps is the mean batch size
    seconds: float  #: spent in them
    failed: Failures = field(default_factory=Failures)  #: so far; requests that ``submit`` refused aren't among them


class Engine(Protocol):
    """Makes images of requests, several at a time where they fit; an image is the same as alone, up to rounding."""

    @property
    def served(self) -> Served:
        """What it serves."""
        ...

    @property
    def load(self) -> Load:
        """How busy it is now."""
        ...

    def submit(self, request: ImageRequest, *, on_step: OnJobStep | None = None) -> Job:
        """Queue one image; from any thread, returns at once.

        Raises:
            QueueFull: as many are waiting as may.
            Draining: ``drain`` was called.
            UsageError: the prompt is too long, or a value can't be used: the queue takes only what can be made.
        """
        ...

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more, finish what was taken; False if that isn't done after ``timeout`` seconds."""
        ...

    def close(self) -> None:
        """Stop the engine's thread; what is unfinished gets ``Draining``."""
        ...
