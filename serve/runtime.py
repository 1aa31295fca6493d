"""What every runtime promises: the same images for the same requests, from the same initial latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError


@dataclass(frozen=True)
class Request:
    """One image to generate. ``(seed, index)`` fixes its initial latents whatever batch it is in.

    ``edit`` is the id of one of a bank's edits; None is the base of a bank that has it, or the model as it is.
    ``height`` and ``width`` are the image's, in pixels; None is the model's own.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    index: int = 0
    edit: str | None = None
    height: int | None = None
    width: int | None = None


#: Called after each denoising step with (steps done, steps in all).
Progress = Callable[[int, int], None]


class Runtime(Protocol):
    """A text-to-image model that can be asked for images."""

    name: str  #: as in reports: ``base torch``, ``edited onnx``, …

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Images as uint8 with shape (n, height, width, 3), in the order of the requests."""
        ...


def requested_size(requests: Sequence[Request], own: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width) in pixels of the images of all requests, of which those that name none have the model's ``own``.

    Raises ``UsageError`` if they are of several sizes, which no one array of images can hold, or if a side that was
    named isn't a multiple of ``multiple`` pixels.
    """
    sizes = {
        (own[0] if one.height is None else one.height, own[1] if one.width is None else one.width) for one in requests
    }
    if len(sizes) > 1:
        shown = " and ".join(f"{width} x {height}" for height, width in sorted(sizes)[:2])
        raise UsageError(f"one call can't give images of {shown} pixels: ask for one size at a time")
    height, width = next(iter(sizes), own)
    if (height, width) != own and any(side < multiple or side % multiple for side in (height, width)):
        raise UsageError(f"images of {width} x {height} pixels: this model's sides are multiples of {multiple}")
    return height, width


def initial_latents(requests: Sequence[Request], shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Standard normal latents, float32 with shape (n, *shape), from a Philox generator keyed by (seed, index).

    ``shape`` is (channels, height, width). Every runtime draws them here, on the CPU, so that a difference between two
    runtimes is the runtime's.
    """
    return np.stack(
        [
            np.random.Generator(np.random.Philox(key=[request.seed, request.index])).standard_normal(shape, np.float32)
            for request in requests
        ]
    )
