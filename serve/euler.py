"""Euler's method on the probability-flow ODE (Karras et al., *Elucidating the Design Space of Diffusion-Based
Generative Models*, NeurIPS 2022, algorithm 2 without churn and without the second-order correction).

In the variance-exploding coordinates σ_t = √((1 − ᾱ_t) / ᾱ_t), with D(x; σ) the denoised sample,

    dx/dσ = (x − D(x; σ)) / σ        x ← x + (σ_{i+1} − σ_i) dx/dσ

and the model sees x / √(σ² + 1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from excise.serve.noise_schedule import (
    Array,
    Config,
    alphas_cumprod,
    choice,
    flag,
    prediction_type,
    refuse,
    spaced,
    timestep_spacing,
    train_timesteps,
    whole,
)

#: ᾱ_T of a schedule with zero terminal SNR: half precision's smallest number, since σ_T would be infinite
TINY_ALPHA = np.float32(2**-24)

NEUTRAL = {
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "timestep_type": "discrete",
}


class EulerDiscrete:
    """diffusers' ``EulerDiscreteScheduler`` without churn. Raises ``ModelError`` for options that aren't supported."""

    def __init__(self, config: Config) -> None:
        refuse(config, NEUTRAL)
        self.prediction = prediction_type(config, ("epsilon", "v_prediction", "sample"))
        self.spacing = timestep_spacing(config, "linspace")
        self.total = train_timesteps(config)
        self.offset = whole(config, "steps_offset", 0, minimum=0)
        alphas = alphas_cumprod(config)
        if flag(config, "rescale_betas_zero_snr", False):
            alphas[-1] = TINY_ALPHA
        self.sigmas: Array = np.sqrt((1 - alphas) / alphas)
        last = choice(config, "final_sigmas_type", "zero", ("zero", "sigma_min"))
        self.final_sigma = float(self.sigmas[0]) if last == "sigma_min" else 0.0

    def start(self, num_inference_steps: int) -> EulerSampler:
        """One run over the timesteps. Raises ``UsageError`` for a number of steps that the schedule hasn't."""
        return EulerSampler(self, num_inference_steps)


class EulerSampler:
    """One run of Euler's method: stateless between steps."""

    def __init__(self, scheduler: EulerDiscrete, num_inference_steps: int) -> None:
        self.scheduler = scheduler
        timesteps = spaced(scheduler.spacing, scheduler.total, num_inference_steps, scheduler.offset)
        self.timesteps: Array = timesteps.astype(np.float32)
        sigmas = np.interp(self.timesteps, np.arange(scheduler.total), scheduler.sigmas)
        self.sigmas: npt.NDArray[np.float32] = np.append(sigmas, scheduler.final_sigma).astype(np.float32)
        largest = float(self.sigmas.max())
        #: standard deviation of the initial latents
        self.init_noise_sigma = (largest**2 + 1) ** 0.5 if scheduler.spacing == "leading" else largest

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """What the model sees at step ``index``: x / √(σ² + 1), shape (n, c, h, w)."""
        return np.asarray(sample / (float(self.sigmas[index]) ** 2 + 1) ** 0.5, np.float32)

    def step(self, model_output: Array, index: int, sample: Array) -> Array:
        """The sample at ``sigmas[index + 1]`` with shape (n, c, h, w), from the one at ``sigmas[index]``."""
        sigma, following = float(self.sigmas[index]), float(self.sigmas[index + 1])
        if self.scheduler.prediction == "epsilon":
            # (x − (x − σ ε)) / σ = ε, without the cancellation
            derivative = model_output
        elif self.scheduler.prediction == "v_prediction":
            denoised = sample / (sigma**2 + 1) - model_output * (sigma / (sigma**2 + 1) ** 0.5)
            derivative = (sample - denoised) / sigma
        else:
            derivative = (sample - model_output) / sigma
        return np.asarray(sample + derivative * (following - sigma), np.float32)

    def keep(self, places: npt.NDArray[np.int64]) -> None:
        """Go on with the samples at these places of the batch: nothing is remembered of the others."""
