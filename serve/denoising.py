"""The guided denoising loop that runtimes without PyTorch share, and what goes in and comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from excise.errors import ArtefactError, UsageError
from excise.serve.guidance import CLASSIFIER_FREE, Guidance
from excise.serve.noise_schedule import Array
from excise.serve.runtime import Progress, Request
from excise.serve.schedulers import Scheduler
from excise.serve.text_conditioning import TextConditioning
from excise.serve.text_requests import RequestTexts


class Denoiser(Protocol):
    """The UNet: latents (b, c, h, w), one timestep, text embeddings (b, t, d) → its output (b, c, h, w).

    Of a bank of edits it is told the index of each image's: ``edit_index`` with shape (n), where b is a multiple of n.
    SDXL's is also given the prompts' vectors, ``text_embeds`` with shape (b, p).
    """

    def __call__(
        self,
        sample: Array,
        timestep: float,
        encoder_hidden_states: Array,
        edit_index: npt.NDArray[np.int64] | None = None,
        *,
        text_embeds: Array | None = None,
    ) -> Array: ...


#: Called after each denoising step with the latents of the batch, float32 with shape (b, c, h, w).
OnStep = Callable[[Array], object]

#: A seed and an index are each a signed 64-bit integer that isn't negative.
LARGEST_KEY = 2**63 - 1


def check_requests(requests: Sequence[Request], guidance_scale: float | Sequence[float]) -> None:
    """Raises ``UsageError`` for a negative or too large seed or index, or a guidance scale that isn't finite.

    ``guidance_scale`` is one for all, or one for each request.
    """
    scales = [guidance_scale] if isinstance(guidance_scale, float | int) else list(guidance_scale)
    if len(scales) not in (1, len(requests)):
        raise UsageError(f"{len(scales)} guidance scales for {len(requests)} requests: give one, or one for each")
    for scale in scales:
        if not math.isfinite(scale):
            raise UsageError(f"guidance_scale={scale}: give a finite number")
    for request in requests:
        for name, value in (("seed", request.seed), ("index", request.index)):
            if not isinstance(value, int | np.integer) or not 0 <= value <= LARGEST_KEY:
                raise UsageError(f"{name}={value}: give an integer from 0 to {LARGEST_KEY}")


class Denoising:
    """A batch on its way from noise to an image, one step at a time; images can leave it early.

    Args:
        denoiser: the UNet.
        scheduler: how many steps there are, and where they lead.
        noise: standard normal with shape (n, c, h, w).
        texts: of n images.
        num_inference_steps: of the whole batch.
        guidance_scale: one for all, or one for each image.
        guidance: how the UNet's outputs for several texts become one.
        edit_index: which of a bank's edits each image gets, with shape (n); None without a bank.

    Raises:
        UsageError: the schedule hasn't that number of steps, or the guidance can't work at that scale.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Scheduler,
        noise: Array,
        texts: RequestTexts,
        *,
        num_inference_steps: int,
        guidance_scale: float | Sequence[float],
        guidance: Guidance = CLASSIFIER_FREE,
        edit_index: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._denoiser, self._sampler = denoiser, scheduler.start(num_inference_steps)
        scales = np.broadcast_to(np.asarray(guidance_scale, np.float32), len(noise))
        self._guide = guidance.start(scales)
        added = texts.guidance if texts.guidance is not None else texts.prompts[:0]
        extra = [added[np.full(len(noise), place)] for place in range(len(added))]
        #: one entry for each text that every image is denoised with, each of n prompts
        self._texts = [texts.negative, texts.prompts, *extra] if self._guide.guided else [texts.prompts]
        self._text = TextConditioning.joined(self._texts)
        self._edit_index = edit_index
        #: The places, among the images that it began with, of those that it still holds.
        self.rows: npt.NDArray[np.int64] = np.arange(len(noise))
        self.latents = np.asarray(noise * np.float32(self._sampler.init_noise_sigma), np.float32)
        self.done, self.total = 0, len(self._sampler.timesteps)

    def step(self) -> Array:
        """The next latents, float32 with shape (n, c, h, w); not to be called after the last step."""
        seen = self._sampler.scale_model_input(self.latents, self.done)
        sample = np.concatenate([seen] * len(self._texts)) if len(self._texts) > 1 else seen
        output = self._denoiser(
            sample,
            float(self._sampler.timesteps[self.done]),
            self._text.embeds,
            self._edit_index,
            text_embeds=self._text.pooled,
        )
        combined = self._guide.combine(np.split(output, len(self._texts)), self.done)
        self.latents = self._sampler.step(combined, self.done, self.latents)
        self.done += 1
        return self.latents

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these of the images only, given by their places among those that are held, in ascending order."""
        chosen = np.asarray(places, np.int64)
        self.rows, self.latents = self.rows[chosen], self.latents[chosen]
        self._texts = [text[chosen] for text in self._texts]
        self._text = TextConditioning.joined(self._texts)
        if self._edit_index is not None:
            self._edit_index = self._edit_index[chosen]
        self._guide.keep(chosen)
        self._sampler.keep(chosen)

    def run(self, progress: Progress | None = None, on_step: OnStep | None = None) -> Array:
        """All steps that are left; the final latents."""
        while self.done < self.total:
            latents = self.step()
            if on_step is not None:
                on_step(latents)
            if progress is not None:
                progress(self.done, self.total)
        return self.latents


def to_uint8(images: Array) -> npt.NDArray[np.uint8]:
    """Images of a VAE, (n, 3, h, w) in [−1, 1], as uint8 with shape (n, h, w, 3), rounded as diffusers does.

    Raises ``ArtefactError`` if there is a value that isn't finite: it would be a black picture.
    """
    if not np.isfinite(images).all():
        raise ArtefactError("vae_decoder returned values that aren't finite: an fp16 VAE overflows, export it in fp32")
    grey = np.clip(images.astype(np.float32) / 2 + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)
    return np.asarray((grey * 255).round(), np.uint8)
