"""A diffusers Stable Diffusion pipeline, 1, 2 or XL, as a ``serve.runtime.Runtime``: the reference for every other one.

What is fixed here so that another runtime can do exactly the same:

- the initial latents are ``initial_latents``; the pipeline itself multiplies them by ``scheduler.init_noise_sigma``;
- an image has the pipeline's own size unless the request names another, in multiples of 8 pixels;
- SDXL is told that an image was neither scaled nor cut, and an empty negative prompt is none (``OnnxRuntime``);
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

from excise.errors import ModelError, PromptTooLong, UsageError
from excise.serve.denoising import Denoising, OnStep, check_requests
from excise.serve.guidance import CLASSIFIER_FREE, Guidance
from excise.serve.runtime import Progress, Request, initial_latents, requested_size
from excise.serve.schedulers import scheduler_from_config
from excise.serve.text_conditioning import TextConditioning, time_ids
from excise.serve.text_requests import RequestTexts, request_texts


class TorchRuntime:
    """Images of a ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``, or of anything built like one.

    Args:
        pipeline: with ``tokenizer``, ``text_encoder``, ``unet``, ``vae``, ``scheduler`` and ``image_processor``, on the
            device and in the precision to run with; SDXL's has a ``tokenizer_2`` and a ``text_encoder_2``, too. Its
            progress bars are switched off.
        name: as in reports.
        batch_size: images denoised together (twice as many samples with guidance).
        guidance: how a prompt, its negative prompt and a concept to stay away from guide the denoising. Another than
            the pipeline's own is computed by ``Denoising``, the loop of the runtimes without PyTorch.

    Raises:
        UsageError: ``batch_size`` is below 1.
        ModelError: the pipeline is SDXL's refiner, or its VAE's latents are normalised.
    """

    def __init__(self, pipeline: Any, *, name: str, batch_size: int = 32, guidance: Guidance = CLASSIFIER_FREE) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        self.name, self.pipeline, self.batch_size, self.guidance = name, pipeline, batch_size, guidance
        #: Whether the pipeline is SDXL, with two text encoders and one vector a prompt.
        self.is_xl = getattr(pipeline, "text_encoder_2", None) is not None
        if self.is_xl and pipeline.config.get("requires_aesthetics_score"):
            raise ModelError(
                f"{name} is SDXL's refiner, which starts from another model's latents: name the base model"
            )
        if pipeline.vae.config.get("latents_mean") is not None:
            raise ModelError(f"{name}: its VAE has latents_mean: latents that are normalised aren't supported here")
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
        place of what the text encoder gives for the prompts; SDXL's vectors stay the prompts'.

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

        height, width = self._size(batch)
        output = self.pipeline(
            **self._texts(batch, prompt_embeds),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=torch.from_numpy(initial_latents(batch, self._latents_of(batch))).to(self.pipeline.unet.dtype),
            output_type="latent",
            callback_on_step_end=step_done,
        )
        return _numpy(output.images)

    def _texts(self, batch: Sequence[Request], prompt_embeds: npt.NDArray[np.float32] | None) -> dict[str, Any]:
        """What the pipeline is called with for the prompts of a batch."""
        unet = self.pipeline.unet
        if not self.is_xl:
            text: dict[str, Any] = {"prompt": [request.prompt for request in batch]}
            if prompt_embeds is not None:
                text = {"prompt_embeds": torch.from_numpy(prompt_embeds).to(unet.device, unet.dtype)}
            return {**text, "negative_prompt": [request.negative_prompt for request in batch]}
        # Zeros for an empty negative prompt are the pipeline's for a whole batch alone, hence not by its own texts.
        texts = self._conditions(batch, (), prompt_embeds)
        given = {
            "prompt_embeds": texts.prompts.embeds,
            "pooled_prompt_embeds": texts.prompts.pooled,
            "negative_prompt_embeds": texts.negative.embeds,
            "negative_pooled_prompt_embeds": texts.negative.pooled,
        }
        return {name: torch.from_numpy(one).to(unet.device, unet.dtype) for name, one in given.items()}

    def _conditions(
        self, batch: Sequence[Request], guidance: Sequence[str], prompt_embeds: npt.NDArray[np.float32] | None
    ) -> RequestTexts:
        """What a batch's texts become, and those of the guidance."""
        zeros = self.is_xl and self.pipeline.config.get("force_zeros_for_empty_prompt", True)
        return request_texts(
            batch,
            guidance,
            self.condition,
            prompt_embeds=prompt_embeds,
            pooled=self.is_xl,
            zeros_for_empty_negative=zeros,
        )

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
            lambda sample, timestep, states, edit_index=None, *, text_embeds=None: self.predict(
                sample, timestep, states, text_embeds=text_embeds
            ),
            scheduler_from_config({**scheduler.config, "_class_name": type(scheduler).__name__}),
            initial_latents(batch, self._latents_of(batch)),
            self._conditions(batch, self.guidance.texts, prompt_embeds),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance=self.guidance,
        )
        return denoising.run(progress, on_step)

    def _check_embeds(self, prompt_embeds: npt.NDArray[np.float32] | None, requests: int) -> None:
        width = sum(encoder.config.hidden_size for _, encoder in self._encoders)
        wanted = (requests, self.pipeline.tokenizer.model_max_length, width)
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
        return self.condition(prompts).embeds

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> TextConditioning:
        """The same with SDXL's vectors. Raises as ``encode`` does."""
        for prompt in prompts:
            self._check_length(prompt)
        if not self.is_xl:
            return TextConditioning(
                _numpy(self.pipeline.encode_prompt(list(prompts), self.pipeline.device, 1, False)[0])
            )
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.pipeline.device, do_classifier_free_guidance=False
        )
        return TextConditioning(_numpy(states), _numpy(pooled))

    @torch.no_grad()
    def predict(
        self,
        sample: npt.NDArray[np.float32],
        timestep: float,
        encoder_hidden_states: npt.NDArray[np.float32],
        *,
        text_embeds: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """The UNet's output, float32 with the shape of ``sample`` (b, c, h, w), for text embeddings (b, t, d).

        SDXL's needs the prompts' vectors, ``text_embeds`` with shape (b, p); the image's size is that of ``sample``.
        """
        unet = self.pipeline.unet
        given = {"sample": sample, "encoder_hidden_states": encoder_hidden_states}
        if self.is_xl:
            if text_embeds is None:
                raise UsageError(f"{self.name} is SDXL: its UNet needs the prompts' vectors, give text_embeds")
            height, width = (side * self.pipeline.vae_scale_factor for side in sample.shape[2:])
            given |= {"text_embeds": text_embeds, "time_ids": time_ids(len(sample), height, width)}
        tensors = {name: torch.from_numpy(one).to(unet.device, unet.dtype) for name, one in given.items()}
        latents, states = tensors.pop("sample"), tensors.pop("encoder_hidden_states")
        added = {"added_cond_kwargs": tensors} if self.is_xl else {}
        return _numpy(unet(latents, torch.tensor(timestep), states, **added, return_dict=False)[0])

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

    @property
    def _encoders(self) -> list[tuple[Any, Any]]:
        """Each text encoder behind its tokenizer."""
        first = (self.pipeline.tokenizer, self.pipeline.text_encoder)
        return [first, (self.pipeline.tokenizer_2, self.pipeline.text_encoder_2)] if self.is_xl else [first]

    def _check_length(self, prompt: str) -> None:
        for tokenizer, encoder in self._encoders:
            limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
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
