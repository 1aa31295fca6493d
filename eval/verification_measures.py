"""What one side of a verification computes: every component on the same inputs, and the whole denoising loop.

The reference goes first and gives the others their inputs: its text states, its final latents for the VAE decoder, and
for the denoiser those latents with the scheduler's own noise on them, x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε (Ho et al. 2020,
eq. 4), so that every timestep sees what it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from excise.errors import NumericsError, UsageError
from excise.eval.verification_prompts import Prompts
from excise.eval.verification_sides import Comparable, Side
from excise.serve.denoising import LARGEST_KEY
from excise.serve.noise_schedule import Array, alphas_cumprod
from excise.serve.runtime import Request
from excise.serve.text_conditioning import TextConditioning

#: The outputs that are compared, and whether each is of one component on given inputs or of the whole loop.
#: ``text_encoder`` is the hidden states of all text encoders, ``pooled_text`` SDXL's one vector a prompt.
OUTPUTS = {"text_encoder": "component", "pooled_text": "component", "denoiser": "component"}
OUTPUTS |= {"vae_decoder": "component", "latents": "loop", "images": "loop"}

#: Called with the number of denoiser calls done since the last time.
Tick = Callable[[int], object]


@dataclass(frozen=True)
class Settings:
    """How the loop is run.

    Attributes:
        num_inference_steps, guidance_scale: As a request's.
        seed: Of the initial latents and of the denoiser's noise.
        timesteps: How many the denoiser is compared at, evenly spread.

    Raises:
        UsageError: A number below 1.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    seed: int = 0
    timesteps: int = 5

    def __post_init__(self) -> None:
        for name, value in (("--steps", self.num_inference_steps), ("--timesteps", self.timesteps)):
            if value < 1:
                raise UsageError(f"{name} {value}: give at least 1")
        if not 0 <= self.seed <= LARGEST_KEY:
            raise UsageError(f"--seed {self.seed}: give an integer from 0 to {LARGEST_KEY}")
        if not math.isfinite(self.guidance_scale):
            raise UsageError(f"--guidance {self.guidance_scale}: give a finite number")


@dataclass(frozen=True)
class Probe:
    """What the components of every side are given.

    Attributes:
        timesteps: Descending.
        states: What the prompts become, by group.
        samples: Noised latents by group, shape (timesteps, n, c, h, w).
        latents: Latents for the VAE decoder by group, shape (n, c, h, w).
    """

    timesteps: tuple[int, ...]
    states: dict[str, TextConditioning]
    samples: dict[str, Array]
    latents: dict[str, Array]


#: Outputs by (output, group, timestep or step; None where there is one only).
Outputs = dict[tuple[str, str, int | None], Array]


def measure_loop(side: Side, prompts: Prompts, settings: Settings, tick: Tick) -> Outputs:
    """Text states, the latents after every step (counted from 1) and the images of every group.

    Raises:
        PromptTooLong: A prompt has more tokens than the text encoder reads.
        UsageError: The schedule hasn't so many steps.
    """
    outputs: Outputs = {}
    with np.errstate(all="ignore"):  # values that aren't finite are looked for afterwards, by name
        for group, texts in prompts.groups.items():
            text = side.runtime.condition(texts)
            outputs["text_encoder", group, None] = text.embeds
            if text.pooled is not None:
                outputs["pooled_text", group, None] = text.pooled
            steps: list[list[Array]] = []
            images = []
            for chunk in _chunks(len(texts), side.runtime.batch_size):
                requests = [Request(texts[row], seed=settings.seed, index=row) for row in chunk]
                latents, after = _denoised(side.runtime, requests, settings, tick)
                steps.append(after)
                images.append(side.runtime.decode_samples(latents))
            for number, parts in enumerate(zip(*steps, strict=True), 1):
                outputs["latents", group, number] = np.concatenate(parts)
            outputs["images", group, None] = np.concatenate(images)
    return outputs


def _denoised(
    runtime: Comparable, requests: list[Request], settings: Settings, tick: Tick
) -> tuple[Array, list[Array]]:
    """Final latents of one batch, and those after each step."""
    after: list[Array] = []

    def on_step(latents: Array) -> None:
        after.append(latents.copy())
        tick(1)

    latents = runtime.denoise(
        requests,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        on_step=on_step,
    )
    return latents, after


def _chunks(total: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, total)) for start in range(0, total, size))


def make_probe(side: Side, outputs: Outputs, prompts: Prompts, settings: Settings) -> Probe:
    """What the components of every side are given, from the reference's own outputs.

    Raises:
        ModelError: The scheduler isn't supported.
        NumericsError: The reference's outputs aren't finite.
    """
    check_finite("the reference", outputs)
    alphas = alphas_cumprod(side.scheduler).astype(np.float64)
    last = len(alphas) - 1
    timesteps = tuple(int(step) for step in np.linspace(0.98 * last, 0.02 * last, settings.timesteps).round())
    random = np.random.default_rng(settings.seed)
    steps = max(step for output, _, step in outputs if output == "latents" and step is not None)
    latents = {group: outputs["latents", group, steps] for group in prompts.groups}
    samples = {}
    for group, clean in latents.items():
        noise = random.standard_normal((len(timesteps), *clean.shape))
        signal = alphas[list(timesteps)].reshape(-1, 1, 1, 1, 1)
        samples[group] = (np.sqrt(signal) * clean + np.sqrt(1 - signal) * noise).astype(np.float32)
    states = {
        group: TextConditioning(outputs["text_encoder", group, None], outputs.get(("pooled_text", group, None)))
        for group in prompts.groups
    }
    return Probe(timesteps, states, samples, latents)


def measure_components(side: Side, probe: Probe, tick: Tick) -> Outputs:
    """The denoiser's and the VAE decoder's outputs on the probe."""
    outputs: Outputs = {}
    with np.errstate(all="ignore"):
        for group, states in probe.states.items():
            rows = list(_chunks(len(states), side.runtime.batch_size))
            for timestep, samples in zip(probe.timesteps, probe.samples[group], strict=True):
                parts = [
                    side.runtime.predict(
                        samples[list(r)], float(timestep), states[list(r)].embeds, text_embeds=states[list(r)].pooled
                    )
                    for r in rows
                ]
                outputs["denoiser", group, timestep] = np.concatenate(parts)
                tick(1)
            decoded = [side.runtime.decode_samples(probe.latents[group][list(r)]) for r in rows]
            outputs["vae_decoder", group, None] = np.concatenate(decoded)
    return outputs


def check_finite(name: str, outputs: Outputs) -> None:
    """Raises ``NumericsError`` for the first output of a side that isn't finite."""
    for key, array in outputs.items():
        if count := not_finite(array):
            raise NumericsError(f"{name}: {shown(key)}: {count} of {array.size} values aren't finite")


def not_finite(array: Array) -> int:
    """How many values are NaN or infinite."""
    return int(array.size - np.isfinite(array).sum())


def shown(key: tuple[str, str, int | None]) -> str:
    """An output's name for people."""
    output, group, at = key
    place = "" if at is None else f", timestep {at}" if output == "denoiser" else f", step {at}"
    return f"{output} on {group} prompts{place}"
