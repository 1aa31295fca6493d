"""PNDM without its Runge–Kutta warm-up: PLMS, the default sampler of Stable Diffusion 1.

Liu et al., *Pseudo Numerical Methods for Diffusion Models on Manifolds*, ICLR 2022. The noise of up to four steps is
combined by Adams–Bashforth (eq. 12), then moved along the manifold by the transfer part (eq. 9)

    x_{t−δ} = √(ᾱ_{t−δ} / ᾱ_t) x_t − (ᾱ_{t−δ} − ᾱ_t) ε̂ / (ᾱ_t √(1 − ᾱ_{t−δ}) + √(ᾱ_t (1 − ᾱ_t) ᾱ_{t−δ}))

The first step is Heun's: its second timestep is evaluated twice, so n ≥ 2 steps call the model n + 1 times.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from excise.serve.noise_schedule import (
    Array,
    Config,
    alphas_cumprod,
    flag,
    prediction_type,
    spaced,
    timestep_spacing,
    train_timesteps,
    unsupported,
    whole,
)


class PNDM:
    """diffusers' ``PNDMScheduler`` with ``skip_prk_steps``. Raises ``ModelError`` for options that aren't supported."""

    def __init__(self, config: Config) -> None:
        if not flag(config, "skip_prk_steps", False):
            raise unsupported({**config, "skip_prk_steps": False}, "skip_prk_steps", (True,))
        self.prediction = prediction_type(config, ("epsilon", "v_prediction"))
        self.spacing = timestep_spacing(config, "leading")
        self.total = train_timesteps(config)
        self.offset = whole(config, "steps_offset", 0, minimum=0)
        # PNDMScheduler has no zero-SNR rescaling: it ignores the option, and so is it here
        self.alphas_cumprod = alphas_cumprod({**config, "rescale_betas_zero_snr": False})
        self.final_alpha = 1.0 if flag(config, "set_alpha_to_one", False) else float(self.alphas_cumprod[0])

    def start(self, num_inference_steps: int) -> PNDMSampler:
        """One run over the timesteps. Raises ``UsageError`` for a number of steps that the schedule hasn't."""
        return PNDMSampler(self, num_inference_steps)


class PNDMSampler:
    """One run of PLMS: remembers the last four noise predictions, so its steps have to be taken in order."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: PNDM, num_inference_steps: int) -> None:
        self.scheduler = scheduler
        timesteps = spaced(scheduler.spacing, scheduler.total, num_inference_steps, scheduler.offset)
        timesteps = timesteps.round()
        self.timesteps: npt.NDArray[np.int64] = np.concatenate(
            [timesteps[:1], timesteps[1:2], timesteps[1:]],
        ).astype(np.int64)
        self.stride = scheduler.total // num_inference_steps
        self.history: deque[Array] = deque(maxlen=4)
        self.first_sample: Array | None = None

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """What the model sees at step ``index``: the latents themselves, shape (n, c, h, w)."""
        return sample

    def step(self, model_output: Array, index: int, sample: Array) -> Array:
        """x_{t−δ} with shape (n, c, h, w), from x_t and the model's output at ``timesteps[index]``."""
        timestep = int(self.timesteps[index])
        previous = timestep - self.stride
        if index == 1 and self.first_sample is not None:
            previous, timestep = timestep, timestep + self.stride
            combined = np.asarray((model_output + self.history[-1]) / 2, np.float32)
            sample, self.first_sample = self.first_sample, None
        else:
            if index == 0:
                self.history.clear()
                self.first_sample = sample
            self.history.append(model_output)
            combined = self.adams_bashforth()
        return self.transfer(combined, timestep, previous, sample)

    def keep(self, places: npt.NDArray[np.int64]) -> None:
        """Go on with the samples at these places of the batch: what is remembered of the others is dropped."""
        self.history = deque((output[places] for output in self.history), maxlen=4)
        self.first_sample = None if self.first_sample is None else self.first_sample[places]

    def adams_bashforth(self) -> Array:
        """The noise predictions so far, combined by the highest order that their number allows (eq. 12)."""
        e = self.history
        if len(e) == 1:
            return e[-1]
        if len(e) == 2:
            return np.asarray((3 * e[-1] - e[-2]) / 2, np.float32)
        if len(e) == 3:
            return np.asarray((23 * e[-1] - 16 * e[-2] + 5 * e[-3]) / 12, np.float32)
        return np.asarray((55 * e[-1] - 59 * e[-2] + 37 * e[-3] - 9 * e[-4]) / 24, np.float32)

    def transfer(self, output: Array, timestep: int, previous: int, sample: Array) -> Array:
        """Eq. 9: the sample at ``previous``, from the one at ``timestep`` and the combined model output."""
        scheduler = self.scheduler
        alpha = float(scheduler.alphas_cumprod[timestep])
        alpha_previous = float(scheduler.alphas_cumprod[previous]) if previous >= 0 else scheduler.final_alpha
        if scheduler.prediction == "v_prediction":
            output = np.asarray(alpha**0.5 * output + (1 - alpha) ** 0.5 * sample, np.float32)
        denominator = alpha * (1 - alpha_previous) ** 0.5 + (alpha * (1 - alpha) * alpha_previous) ** 0.5
        moved = (alpha_previous / alpha) ** 0.5 * sample - (alpha_previous - alpha) / denominator * output
        return np.asarray(moved, np.float32)
