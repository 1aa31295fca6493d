"""The guided denoising loop that runtimes without PyTorch share, and what goes in and comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from excise.errors import ArtefactError, UsageError
from excise.serve.noise_schedule import Array
from excise.serve.runtime import Progress, Request
from excise.serve.schedulers import Scheduler

#: The UNet: latents (b, c, h, w), one timestep, text embeddings (b, t, d) → its output (b, c, h, w).
Denoiser = Callable[[Array, float, Array], Array]

#: Called after each denoising step with the latents of the batch, float32 with shape (b, c, h, w).
OnStep = Callable[[Array], object]

#: A seed and an index are each a signed 64-bit integer that isn't negative.
LARGEST_KEY = 2**63 - 1


def check_requests(requests: Sequence[Request], guidance_scale: float) -> None:
    """Raises ``UsageError`` for a negative or too large seed or index, or a guidance scale that isn't finite."""
    if not math.isfinite(guidance_scale):
        raise UsageError(f"guidance_scale={guidance_scale}: give a finite number")
    for request in requests:
        for name, value in (("seed", request.seed), ("index", request.index)):
            if not isinstance(value, int | np.integer) or not 0 <= value <= LARGEST_KEY:
                raise UsageError(f"{name}={value}: give an integer from 0 to {LARGEST_KEY}")


def denoise(
    denoiser: Denoiser,
    scheduler: Scheduler,
    noise: Array,
    prompt_embeds: Array,
    negative_prompt_embeds: Array,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Array:
    """The final latents, float32 with shape (n, c, h, w).

    ``noise`` is standard normal with shape (n, c, h, w), both embeddings have shape (n, t, d). Classifier-free
    guidance (Ho & Salimans 2022), ε = ε(∅) + w (ε(c) − ε(∅)), calls the denoiser once per step with a batch of 2n, the
    negative prompts first; w ≤ 1 switches it off, as in diffusers, and the batch is n.

    Raises ``UsageError`` for a number of steps that the schedule hasn't.
    """
    sampler = scheduler.start(num_inference_steps)
    guided = guidance_scale > 1
    embeds = np.concatenate([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds
    scale = np.float32(guidance_scale)
    latents = np.asarray(noise * np.float32(sampler.init_noise_sigma), np.float32)
    total = len(sampler.timesteps)
    for index, timestep in enumerate(sampler.timesteps):
        seen = sampler.scale_model_input(latents, index)
        output = denoiser(np.concatenate([seen, seen]) if guided else seen, float(timestep), embeds)
        if guided:
            unconditional, conditional = np.split(output, 2)
            output = unconditional + scale * (conditional - unconditional)
        latents = sampler.step(output, index, latents)
        if on_step is not None:
            on_step(latents)
        if progress is not None:
            progress(index + 1, total)
    return latents


def to_uint8(images: Array) -> npt.NDArray[np.uint8]:
    """Images of a VAE, (n, 3, h, w) in [−1, 1], as uint8 with shape (n, h, w, 3), rounded as diffusers does.

    Raises ``ArtefactError`` if there is a value that isn't finite: it would be a black picture.
    """
    if not np.isfinite(images).all():
        raise ArtefactError("vae_decoder returned values that aren't finite: an fp16 VAE overflows, export it in fp32")
    grey = np.clip(images.astype(np.float32) / 2 + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)
    return np.asarray((grey * 255).round(), np.uint8)
