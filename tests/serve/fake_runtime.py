"""A runtime without a model: it stops before every step until the test lets it go on, and says which rows it has."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.errors import PromptTooLong
from excise.serve.engine import Served, ServedEdit
from excise.serve.guidance import CLASSIFIER_FREE
from excise.serve.noise_schedule import Array, check_steps
from excise.serve.runtime import Request

#: Longer than anything here takes: a test that would hang fails.
PATIENCE = 20.0
EDIT = "e" * 64

SERVED = Served(
    model="fake",
    edits=(ServedEdit("gun", EDIT, "erases guns"), ServedEdit("base", None, "the unedited model")),
    image_shape=(1, 1, 3),
    max_prompt_tokens=4,
    manifest=None,
    concepts={"gun": ("gun",), "base": ()},
)


class FakeTokenizer:
    """A word is a token, and four fit."""

    def encode(self, prompts: Sequence[str]) -> npt.NDArray[np.int64]:
        for prompt in prompts:
            if len(prompt.split()) > 4:
                raise PromptTooLong(f"{prompt!r} is too long")
        return np.zeros((len(prompts), 4), np.int64)


class FakeScheduler:
    """A thousand steps at most."""

    def start(self, num_inference_steps: int) -> Any:
        check_steps(num_inference_steps, 1000)


class FakeRuntime:
    """Images of one pixel that hold the request's seed.

    ``batches`` are the seeds of every batch, ``steps`` the seeds of the rows of every UNet call that was let through,
    ``decoded`` those of every image. A row whose seed is in ``poison`` makes its whole batch fail; ``wrong_count``
    images are missing from what is decoded.
    """

    def __init__(self, *, stops: bool = True) -> None:
        self.tokenizer, self.scheduler, self.guidance = FakeTokenizer(), FakeScheduler(), CLASSIFIER_FREE
        self.batches: list[list[int]] = []
        self.steps: list[list[int]] = []
        self.decoded: list[int] = []
        self.poison: dict[int, Exception] = {}
        self.wrong_count = 0
        self.on_call: Any = lambda: None
        self._stops, self._entered, self._allowed = stops, queue.Queue[list[int]](), threading.Semaphore(0)

    def start(
        self, requests: Sequence[Request], *, num_inference_steps: int, guidance_scale: float | Sequence[float]
    ) -> FakeSteps:
        assert len(requests) == len(list(guidance_scale)) > 0  # type: ignore[arg-type]
        seeds = [request.seed for request in requests]
        self.batches.append(seeds)
        return FakeSteps(self, seeds, num_inference_steps)

    def decode(self, latents: Array) -> npt.NDArray[np.uint8]:
        seeds = [int(latent.flat[0]) for latent in latents]
        self.decoded += seeds
        images = np.array(seeds, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
        return images[: len(images) - self.wrong_count]

    def at_step(self) -> list[int]:
        """Wait until the engine is about to call the UNet; the seeds of the rows."""
        return self._entered.get(timeout=PATIENCE)

    def go(self, steps: int = 1) -> None:
        """Let so many calls through."""
        self._allowed.release(steps)

    def call(self, seeds: list[int]) -> None:
        if self._stops:
            self._entered.put(seeds)
            assert self._allowed.acquire(timeout=PATIENCE), "the test never let this step through"
        for seed in seeds:
            if seed in self.poison:
                raise self.poison[seed]
        self.on_call()
        self.steps.append(seeds)


class FakeSteps:
    """One batch of the fake."""

    def __init__(self, runtime: FakeRuntime, seeds: list[int], total: int) -> None:
        self._runtime, self._seeds, self.done, self.total = runtime, seeds, 0, total

    @property
    def latents(self) -> Array:
        return np.array(self._seeds, np.float32).reshape(-1, 1, 1, 1)

    def step(self) -> Array:
        self._runtime.call(list(self._seeds))
        self.done += 1
        return self.latents

    def keep(self, places: Sequence[int]) -> None:
        assert list(places) == sorted(set(places))
        self._seeds = [self._seeds[place] for place in places]
