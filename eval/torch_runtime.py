"""A diffusers Stable Diffusion pipeline as a ``serve.runtime.Runtime``: the reference for every other runtime.

What is fixed here so that another runtime can do exactly the same:

- the initial latents are ``initial_latents``; the pipeline itself multiplies them by ``scheduler.init_noise_sigma``;
- an image has the pipeline's own size unless the request names another, in multiples of 8 pixels;
- prompts are padded to the tokenizer's maximal length, and a longer prompt is refused instead of cut;
- the image is ``vae.decode(latents / scaling_factor)``, mapped to [0, 1], clipped, times 255 and rounded; no safety
  checker ever replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from excise.errors import PromptTooLong, UsageError
from excise.serve.denoising import Denoising, OnStep, check_requests
from excise.serve.guidance import CLASSIFIER_FREE, Guidance
from excise.serve.runtime import Progress, Request, initial_latents, requested_size
from excise.serve.schedulers import scheduler_from_config


class TorchRuntime:
    """Images of a ``StableDiffusionPipeline``, or of anything that is called and built like one.

    Args:
        pipeline: with ``tokenizer``, ``text_encoder``, ``unet``, ``vae``, ``scheduler`` and ``image_processor``, on the
            device and in the precision to run with. Its progress bars are switched off.
        name: as in reports.
        batch_size: images denoised together (twice as many samples with guidance).
        guidance: how a prompt, its negative prompt and a concept to stay away from guide the denoising. Another than
            the pipeline's own is computed by ``Denoising``, the loop of the runtimes without PyTorch.
    """

    def __init__(self, pipeline: Any, *, name: str, batch_size: int = 32, guidance: Guidance = CLASSIFIER_FREE) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        self.name, self.pipeline, self.batch_size, self.guidance = name, pipeline, batch_size, guidance
        pipeline.set_progress_bar_config(disable=True)
        sample_size = pipeline.unet.config.sample_size
        height, width = sample_size if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
        #: (channels, height, width) of the latents of an image of the pipeline's own size.
        self.latent_shape: tuple[int, int, int] = (pipeline.unet.config.in_channels, height, width)
        #: (height, width) of such an image, in pixels.
        self.image_size: tuple[int, int] = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
        prompt_embeds: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Images as uint8 with shape (n, height, width, 3), in the order of the requests.

        ``progress`` counts the steps of all batches together. ``prompt_embeds``, with shape (n, tokens, d), take the
        place of what the text encoder gives for the prompts.

        Raises:
            PromptTooLong: a prompt or negative prompt has more tokens than the text encoder reads.
            UsageError: ``prompt_embeds`` of another shape, requests of several sizes, or a size that can't be made.
        """
        latents = self.denoise(
            requests,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            progress=progress,
            prompt_embeds=prompt_embeds,
        )
        images = [self._decode(latents[start : start + self.batch_size]) for start in self._starts(requests)]
        return np.concatenate([np.zeros((0, *self._size(requests), 3), np.uint8), *images])

    def denoise(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
        prompt_embeds: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Final latents, before the VAE, as float32 with shape (n, channels, height, width).

        ``on_step`` is given each batch's latents after each of its steps.

        Raises:
            PromptTooLong: a prompt or negative prompt has more tokens than the text encoder reads.
            UsageError: ``prompt_embeds`` of another shape, requests of several sizes, or a size that can't be made.
        """
        for request in requests:
            self._check_length(request.prompt)
            self._check_length(request.negative_prompt)
        self._check_embeds(prompt_embeds, len(requests))
        starts = self._starts(requests)
        latents = [np.zeros((0, *self._latents_of(requests)), np.float32)]
        for number, start in enumerate(starts):
            chosen = slice(start, start + self.batch_size)

            def report(done: int, total: int, before: int = number) -> None:
                if progress is not None:
                    progress(before * total + done, len(starts) * total)

            batch = self._denoise if self.guidance is CLASSIFIER_FREE else self._denoise_guided
            embeds = None if prompt_embeds is None else prompt_embeds[chosen]
            latents.append(batch(requests[chosen], num_inference_steps, guidance_scale, report, on_step, embeds))
        return np.concatenate(latents)

    def _denoise(
        self,
        batch: Sequence[Request],
        num_inference_steps: int,
        guidance_scale: float,
        progress: Progress,
        on_step: OnStep | None,
        prompt_embeds: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.float32]:
        """One batch by the pipeline itself."""

        def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress(step + 1, pipeline.num_timesteps)
            if on_step is not None:
                on_step(_numpy(tensors["latents"]))
            return tensors

        text: dict[str, Any] = {"prompt": [request.prompt for request in batch]}
        if prompt_embeds is not None:
            unet = self.pipeline.unet
            text = {"prompt_embeds": torch.from_numpy(prompt_embeds).to(unet.device, unet.dtype)}
        height, width = self._size(batch)
        output = self.pipeline(
            **text,
            negative_prompt=[request.negative_prompt for request in batch],
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=torch.from_numpy(initial_latents(batch, self._latents_of(batch))).to(self.pipeline.unet.dtype),
            output_type="latent",
            callback_on_step_end=step_done,
        )
        return _numpy(output.images)

    def _denoise_guided(
        self,
        batch: Sequence[Request],
        num_inference_steps: int,
        guidance_scale: float,
        progress: Progress,
        on_step: OnStep | None,
        prompt_embeds: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.float32]:
        """One batch by excise's own loop, with this runtime's guidance."""
        check_requests(batch, guidance_scale)
        scheduler = self.pipeline.scheduler
        denoising = Denoising(
            lambda sample, timestep, states, edit_index=None: self.predict(sample, timestep, states),
            scheduler_from_config({**scheduler.config, "_class_name": type(scheduler).__name__}),
            initial_latents(batch, self._latents_of(batch)),
            self.encode([request.prompt for request in batch]) if prompt_embeds is None else prompt_embeds,
            self.encode([request.negative_prompt for request in batch]),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance=self.guidance,
            guidance_embeds=list(self.encode(self.guidance.texts)),
        )
        return denoising.run(progress, on_step)

    def _check_embeds(self, prompt_embeds: npt.NDArray[np.float32] | None, requests: int) -> None:
        config = self.pipeline.text_encoder.config
        wanted = (requests, self.pipeline.tokenizer.model_max_length, config.hidden_size)
        if prompt_embeds is not None and prompt_embeds.shape != wanted:
            raise UsageError(f"prompt_embeds has shape {prompt_embeds.shape}: give {wanted}")

    def _size(self, requests: Sequence[Request]) -> tuple[int, int]:
        """(height, width) in pixels that all ask for: multiples of 8, as diffusers wants, and of the VAE's factor."""
        return requested_size(requests, self.image_size, math.lcm(8, self.pipeline.vae_scale_factor))

    def _latents_of(self, requests: Sequence[Request]) -> tuple[int, int, int]:
        """(channels, height, width) of the requests' latents."""
        height, width = (side // self.pipeline.vae_scale_factor for side in self._size(requests))
        return (self.latent_shape[0], height, width)

    def _starts(self, requests: Sequence[Request]) -> range:
        return range(0, len(requests), self.batch_size)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Text embeddings of at least one prompt, float32 with shape (n, tokens, d).

        Raises:
            PromptTooLong: a prompt has more tokens than the text encoder reads.
        """
        for prompt in prompts:
            self._check_length(prompt)
        states = self.pipeline.encode_prompt(list(prompts), self.pipeline.device, 1, False)[0]
        return _numpy(states)

    @torch.no_grad()
    def predict(
        self, sample: npt.NDArray[np.float32], timestep: float, encoder_hidden_states: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """The UNet's output, float32 with the shape of ``sample`` (b, c, h, w), for text embeddings (b, t, d)."""
        unet = self.pipeline.unet
        latents, states = (torch.from_numpy(one).to(unet.device, unet.dtype) for one in (sample, encoder_hidden_states))
        return _numpy(unet(latents, torch.tensor(timestep), states, return_dict=False)[0])

    @torch.no_grad()
    def decode_samples(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What the VAE gives for latents, float32 with shape (n, 3, height, width): −1 is black, 1 is white."""
        return _numpy(self._samples(latents))

    def _samples(self, latents: npt.NDArray[np.float32]) -> torch.Tensor:
        vae = self.pipeline.vae
        samples = torch.from_numpy(latents).to(vae.device, vae.dtype) / vae.config.scaling_factor
        decoded: torch.Tensor = vae.decode(samples, return_dict=False)[0]
        return decoded

    @torch.no_grad()
    def _decode(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """As ``StableDiffusionPipeline.__call__`` does after the last step, without the safety checker."""
        images = self.pipeline.image_processor.postprocess(self._samples(latents), output_type="np")
        pixels: npt.NDArray[np.uint8] = np.round(images * 255).astype(np.uint8)
        return pixels

    def _check_length(self, prompt: str) -> None:
        tokenizer = self.pipeline.tokenizer
        limit = min(tokenizer.model_max_length, self.pipeline.text_encoder.config.max_position_embeddings)
        # Not through tokenizer(prompt): that logs its own warning about an over-long prompt.
        length = len(tokenizer.tokenize(prompt)) + tokenizer.num_special_tokens_to_add()
        if length > limit:
            raise PromptTooLong(
                f"a prompt of {length} tokens, where the text encoder reads {limit}: shorten {_shown(prompt)}"
            )


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")
