"""The schedulers by the class names that a diffusers ``scheduler_config.json`` uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from excise.errors import ModelError
from excise.serve.ddim import DDIM
from excise.serve.euler import EulerDiscrete
from excise.serve.json_object import read_json_object
from excise.serve.noise_schedule import Array, Config
from excise.serve.pndm import PNDM


class Sampler(Protocol):
    """One run over the timesteps. Its steps are taken in order, ``index`` = 0, 1, …, ``len(timesteps) - 1``."""

    @property
    def timesteps(self) -> npt.NDArray[np.number[Any]]:
        """What the model is called with, int64 or float32; PNDM's second one is there twice."""
        ...

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation that the initial latents are to have."""
        ...

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """What the model sees of the latents, float32 with shape (n, c, h, w)."""
        ...

    def step(self, model_output: Array, index: int, sample: Array) -> Array:
        """The next latents, float32 with shape (n, c, h, w)."""
        ...

    def keep(self, places: npt.NDArray[np.int64]) -> None:
        """Go on with the samples at these places of the batch, in their order."""
        ...


class Scheduler(Protocol):
    """A noise schedule with its sampling method: immutable, safe to share between threads."""

    def start(self, num_inference_steps: int) -> Sampler:
        """One run. Raises ``UsageError`` for a number of steps that the schedule hasn't."""
        ...


SCHEDULERS: Mapping[str, Callable[[Config], Scheduler]] = {
    "DDIMScheduler": DDIM,
    "PNDMScheduler": PNDM,
    "EulerDiscreteScheduler": EulerDiscrete,
}


def scheduler_from_config(config: Config) -> Scheduler:
    """The scheduler of a parsed ``scheduler_config.json``.

    Raises ``ModelError`` for a class or an option that isn't supported, naming those that are.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ModelError(f"the scheduler {name!r} isn't supported, only {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name](config)


def read_scheduler(file: Path) -> Scheduler:
    """The scheduler of a ``scheduler_config.json``. Raises ``ModelError`` if it can't be read or isn't supported."""
    return scheduler_from_config(read_scheduler_config(file))


def read_scheduler_config(file: Path) -> dict[str, Any]:
    """What a ``scheduler_config.json`` says. Raises ``ModelError`` if it can't be read or isn't an object."""
    return read_json_object(file, name="the scheduler's configuration ", error=ModelError)
