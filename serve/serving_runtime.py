"""What the batching engine needs of a runtime; ``OnnxRuntime`` has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from excise.serve.guidance import Guidance
from excise.serve.noise_schedule import Array
from excise.serve.runtime import Request
from excise.serve.schedulers import Scheduler


class Tokenizer(Protocol):
    """Checks prompts before they are queued."""

    def encode(self, prompts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token ids. Raises ``UsageError`` for a prompt that is too long, or isn't text."""
        ...


class Steps(Protocol):
    """A batch on its way from noise to images; ``excise.serve.denoising.Denoising`` is one."""

    @property
    def done(self) -> int:
        """UNet calls so far."""
        ...

    @property
    def total(self) -> int:
        """UNet calls in all."""
        ...

    @property
    def latents(self) -> Array:
        """As they are now, with shape (n, c, h, w)."""
        ...

    def step(self) -> Array:
        """The next latents."""
        ...

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these of the images that it still holds, given by their places, in ascending order."""
        ...


class ServingRuntime(Protocol):
    """A text-to-image model that starts batches and decodes them."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of its prompts."""
        ...

    @property
    def scheduler(self) -> Scheduler:
        """Which numbers of steps it can take."""
        ...

    @property
    def guidance(self) -> Guidance:
        """At which scales it can work."""
        ...

    def start(
        self, requests: Sequence[Request], *, num_inference_steps: int, guidance_scale: float | Sequence[float]
    ) -> Steps:
        """One batch of all requests, before its first step."""
        ...

    def decode(self, latents: Array) -> npt.NDArray[np.uint8]:
        """Images as uint8 with shape (n, height, width, 3)."""
        ...
