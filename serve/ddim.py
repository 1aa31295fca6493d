"""DDIM (Song, Meng & Ermon, *Denoising Diffusion Implicit Models*, ICLR 2021), eq. 12 with σ = 0.

    x_{t−1} = √ᾱ_{t−1} x̂₀ + √(1 − ᾱ_{t−1}) ε̂        x̂₀ = (x_t − √(1 − ᾱ_t) ε̂) / √ᾱ_t

A model that predicts v = √ᾱ ε − √(1 − ᾱ) x₀ (Salimans & Ho 2022) or x₀ is turned into the pair (x̂₀, ε̂) first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from excise.serve.noise_schedule import (
    Array,
    Config,
    alphas_cumprod,
    flag,
    number,
    prediction_type,
    refuse,
    spaced,
    timestep_spacing,
    train_timesteps,
    whole,
)


class DDIM:
    """diffusers' ``DDIMScheduler`` at η = 0. Raises ``ModelError`` for options that aren't supported."""

    def __init__(self, config: Config) -> None:
        refuse(config, {"thresholding": False})
        self.prediction = prediction_type(config, ("epsilon", "v_prediction", "sample"))
        self.spacing = timestep_spacing(config, "leading")
        self.total = train_timesteps(config)
        self.offset = whole(config, "steps_offset", 0, minimum=0)
        self.clip = number(config, "clip_sample_range", 1.0) if flag(config, "clip_sample", True) else None
        self.alphas_cumprod = alphas_cumprod(config)
        self.final_alpha = 1.0 if flag(config, "set_alpha_to_one", True) else float(self.alphas_cumprod[0])

    def start(self, num_inference_steps: int) -> DDIMSampler:
        """One run over the timesteps. Raises ``UsageError`` for a number of steps that the schedule hasn't."""
        return DDIMSampler(self, num_inference_steps)


class DDIMSampler:
    """One run of DDIM: stateless between steps."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: DDIM, num_inference_steps: int) -> None:
        self.scheduler = scheduler
        self.timesteps: npt.NDArray[np.int64] = (
            spaced(scheduler.spacing, scheduler.total, num_inference_steps, scheduler.offset).round().astype(np.int64)
        )
        self.stride = scheduler.total // num_inference_steps

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """What the model sees at step ``index``: the latents themselves, shape (n, c, h, w)."""
        return sample

    def step(self, model_output: Array, index: int, sample: Array) -> Array:
        """x_{t−1} with shape (n, c, h, w), from x_t and the model's output at ``timesteps[index]``."""
        scheduler = self.scheduler
        timestep = int(self.timesteps[index])
        previous = timestep - self.stride
        alpha = float(scheduler.alphas_cumprod[timestep])
        alpha_previous = float(scheduler.alphas_cumprod[previous]) if previous >= 0 else scheduler.final_alpha
        signal, noise = np.float32(alpha**0.5), np.float32((1 - alpha) ** 0.5)
        clean: Array
        epsilon: Array
        if scheduler.prediction == "epsilon":
            epsilon = model_output
            # ᾱ_T = 0 holds no signal to predict x₀ from: the same infinities as diffusers, and no warning
            with np.errstate(divide="ignore", invalid="ignore"):
                clean = np.asarray((sample - noise * model_output) / signal, np.float32)
        elif scheduler.prediction == "v_prediction":
            clean = signal * sample - noise * model_output
            epsilon = signal * model_output + noise * sample
        else:
            clean = model_output
            epsilon = np.asarray((sample - signal * clean) / noise, np.float32)
        if scheduler.clip is not None:
            clean = np.clip(clean, -scheduler.clip, scheduler.clip)
        return np.asarray(alpha_previous**0.5 * clean + (1 - alpha_previous) ** 0.5 * epsilon, np.float32)

    def keep(self, places: npt.NDArray[np.int64]) -> None:
        """Go on with the samples at these places of the batch: nothing is remembered of the others."""
