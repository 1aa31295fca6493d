"""Images from an exported Stable Diffusion 1, 2 or XL pipeline by ONNX Runtime, without PyTorch.

The folder is what Optimum's text-to-image export writes: ``text_encoder``, ``unet`` and ``vae_decoder``, each with
``model.onnx`` and ``config.json``, ``tokenizer`` and ``scheduler/scheduler_config.json``; and of SDXL
``text_encoder_2`` and ``tokenizer_2``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from excise.edited_initializers import edited_values
from excise.editfile import Edit
from excise.errors import ArtefactError, UsageError
from excise.onnx_metadata import EDIT_INDEX, read_edit_id
from excise.serve.bank import edit_indices, read_bank
from excise.serve.denoising import Denoising, OnStep, check_requests, to_uint8
from excise.serve.guidance import CLASSIFIER_FREE, Guidance
from excise.serve.latent_shape import check_fixed_shape, halvings, latent_shape, positive
from excise.serve.noise_schedule import Array
from excise.serve.onnx_component import OnnxComponent, Provider, engine_key, providers
from excise.serve.provider_options import provider_options
from excise.serve.runtime import Progress, Request, initial_latents, requested_size
from excise.serve.schedulers import read_scheduler
from excise.serve.text_conditioning import TextConditioning
from excise.serve.text_encoders import POOLED, TextEncoder, check_widths, encode_texts
from excise.serve.text_layout import check_files, open_tokenizers, read_text_layout
from excise.serve.text_requests import RequestTexts, request_texts
from excise.serve.tokenizer import PromptTokenizer
from excise.serve.unet_inputs import unet_inputs

#: Of Stable Diffusion 1 and 2; ``read_text_layout`` has those of one folder.
COMPONENTS = ("text_encoder", "unet", "vae_decoder")


class OnnxRuntime:
    """An exported pipeline. It has no state between calls, so threads can share it.

    ``folder`` is the export, ``name`` what reports call it, ``provider`` where it runs (``cuda`` and ``tensorrt`` need
    the extra ``gpu``), ``threads`` how many CPU threads one operator takes (all of them by default), and
    ``batch_size`` how many images are denoised at a time: with guidance the UNet's batch is twice that. ``edit``
    takes the place of the edit that the folder carries, in memory alone; ``edit_id`` is the id of the one in effect.
    ``guidance`` is how a prompt, its negative prompt and a concept to stay away from guide the denoising.

    A request's empty negative prompt, which is what one has that names none, is what diffusers' pipeline takes for
    none: in SDXL zeros in place of the text encoders' outputs where ``model_index.json`` says
    ``force_zeros_for_empty_prompt``, as it does for the base model; otherwise the empty text's.

    ``device`` is the GPU's number, and ``tf32`` lets CUDA round float32 factors to 11 bits, which is faster.
    ``engine_cache`` is where the TensorRT provider keeps the engines that it builds, one folder for each manifest and
    edit; the files are compared with the manifest first. Without a cache, and for a folder without a manifest, it
    builds them at every start.

    Raises ``ArtefactError`` for a folder that is incomplete or can't be loaded, keeps no unedited weights for ``edit``
    to start from, or isn't as its manifest says where engines are kept by that, ``ModelError`` for a scheduler,
    tokenizer or model that isn't supported, ``EditError`` for an edit of another model, and ``UsageError`` for a
    provider that this machine hasn't.
    """

    #: SDXL's second text encoder and its tokenizer; a runtime of Stable Diffusion 1 and 2 leaves them as they are here.
    _text_encoder_2: OnnxComponent | None = None
    tokenizer_2: PromptTokenizer | None = None
    _zeros_for_empty_negative = False

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "onnx",
        provider: Provider = "cpu",
        threads: int | None = None,
        batch_size: int = 32,
        edit: Edit | None = None,
        device: int = 0,
        tf32: bool = False,
        engine_cache: Path | None = None,
        guidance: Guidance = CLASSIFIER_FREE,
    ) -> None:
        folder = Path(folder)
        for option, value in (("batch_size", batch_size), ("threads", threads)):
            if value is not None and value < 1:
                raise UsageError(f"{option}={value}: give an integer from 1")
        providers(provider)
        layout = read_text_layout(folder)
        check_files(folder, layout)
        self.name, self.folder, self.batch_size, self.guidance = name, folder, batch_size, guidance
        self.scheduler = read_scheduler(folder / "scheduler" / "scheduler_config.json")

        self.bank = read_bank(folder / "unet" / "model.onnx")
        if self.bank is not None and edit is not None:
            raise UsageError(f"{folder} holds a bank of edits: name one in each request, not one for all")
        carried = (read_edit_id(folder / part / "model.onnx") for part in ("unet", *layout.encoders))
        self.edit_id = edit.id if edit is not None else next(filter(None, carried), None)
        edited = {"unet": edited_values(folder, edit)} if edit is not None else {}
        manifest = engine_key(folder) if provider == "tensorrt" and engine_cache is not None else None

        def load(component: str, inputs: Sequence[str], output: str, optional: Sequence[str] = ()) -> OnnxComponent:
            return OnnxComponent(
                folder,
                component,
                inputs=inputs,
                optional=optional,
                output=output,
                provider=provider,
                threads=threads,
                provider_options=dict(
                    provider_options(
                        provider,
                        manifest,
                        engine_cache,
                        component=component,
                        edit_id=edit.id if edit is not None else None,
                        device=device,
                        tf32=tf32,
                    )
                ),
                initializers=edited.get(component),
            )

        self._text_encoder = load("text_encoder", ["input_ids"], "last_hidden_state")
        added = []
        if len(layout.encoders) > 1:
            self._text_encoder_2 = load("text_encoder_2", ["input_ids"], POOLED)
            self._zeros_for_empty_negative = layout.zeros_for_empty_negative
            added = ["text_embeds", "time_ids"]
        self._unet = load("unet", ["sample", "timestep", "encoder_hidden_states", *added], "out_sample", [EDIT_INDEX])
        encoders = [one for one in (self._text_encoder, self._text_encoder_2) if one is not None]
        if added:
            check_widths(self._unet, *encoders)
        if self._unet.takes(EDIT_INDEX) != (self.bank is not None):
            raise ArtefactError(f"{folder}/unet/model.onnx is half a bank of edits: make the bank again")
        self._vae_decoder = load("vae_decoder", ["latent_sample"], "sample")
        self.tokenizer, *second = open_tokenizers(
            folder, layout, [one.config.get("max_position_embeddings") for one in encoders]
        )
        self.tokenizer_2 = next(iter(second), None)
        self.latent_shape = latent_shape(self._unet.config, self._vae_decoder.config)
        self._upscaling = halvings(self._vae_decoder.config)
        _, height, width = self.latent_shape
        self.image_shape = (height * self._upscaling, width * self._upscaling, 3)
        self._scaling_factor = np.float32(positive(self._vae_decoder.config, "scaling_factor", 0.18215))
        self._shift_factor = np.float32(self._vae_decoder.config.get("shift_factor") or 0.0)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float | Sequence[float] = 7.5,
        progress: Progress | None = None,
        prompt_embeds: Array | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Images as uint8 with shape (n, height, width, 3), in the order of the requests.

        An image depends on its own request alone, up to rounding, whatever the others are. ``guidance_scale`` is one
        for all or one for each. ``progress`` counts the UNet's calls over all batches (PNDM makes one more than
        ``num_inference_steps``). Requests of another size than the export's own need one whose shapes are free; those
        of one call are of one size. ``prompt_embeds``, float32 with shape (n, tokens, d), take the place of what the
        text encoders give for the prompts; SDXL's vectors stay the prompts'. Raises ``UsageError`` for a number of
        steps, a guidance scale, a seed, a size or embeddings that can't be used, ``PromptTooLong`` before anything is
        computed, and ``ArtefactError`` if the models return something that isn't an image.
        """
        images = [
            self.decode(latents)
            for latents in self._denoised(requests, num_inference_steps, guidance_scale, progress, None, prompt_embeds)
        ]
        return np.concatenate(images or [np.empty((0, *self.image_shape), np.uint8)])

    def denoise(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float | Sequence[float] = 7.5,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
        prompt_embeds: Array | None = None,
    ) -> Array:
        """The final latents that ``generate`` decodes, float32 with shape (n, channels, height, width).

        ``on_step`` is given each batch's latents after each of its steps. Raises as ``generate`` does.
        """
        latents = self._denoised(requests, num_inference_steps, guidance_scale, progress, on_step, prompt_embeds)
        return np.concatenate([*latents] or [np.empty((0, *self.latent_shape), np.float32)])

    def start(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int,
        guidance_scale: float | Sequence[float],
        prompt_embeds: Array | None = None,
    ) -> Denoising:
        """One batch of all requests, at least one, before its first step: ``decode`` makes images of its latents.

        Raises as ``generate`` does.
        """
        check_requests(requests, guidance_scale)
        return self._begin(requests, num_inference_steps, guidance_scale, self._texts(requests, prompt_embeds))

    def _texts(self, requests: Sequence[Request], prompt_embeds: Array | None) -> RequestTexts:
        return request_texts(
            requests,
            self.guidance.texts,
            self.condition,
            prompt_embeds=prompt_embeds,
            pooled=self.tokenizer_2 is not None,
            zeros_for_empty_negative=self._zeros_for_empty_negative,
        )

    def _begin(
        self, requests: Sequence[Request], steps: int, guidance_scale: float | Sequence[float], texts: RequestTexts
    ) -> Denoising:
        return Denoising(
            self.predict,
            self.scheduler,
            initial_latents(requests, self._latents_of(requests)),
            texts,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance=self.guidance,
            edit_index=self._edit_indices(requests),
        )

    def encode(self, prompts: Sequence[str]) -> Array:
        """Text embeddings, float32 with shape (n, tokens, d): each distinct prompt is computed once.

        Raises ``PromptTooLong`` and ``UsageError`` as the tokenizer does.
        """
        return self.condition(prompts).embeds

    def condition(self, prompts: Sequence[str]) -> TextConditioning:
        """The same with SDXL's vectors. Raises as ``encode`` does."""
        if not prompts:
            width = self._unet.width("encoder_hidden_states", 2) or 0
            empty = np.empty((0, self.tokenizer.max_length, width), np.float32)
            return TextConditioning(empty, None if self.tokenizer_2 is None else np.empty((0, 0), np.float32))
        encoders = [TextEncoder(self.tokenizer, self._text_encoder)]
        if self._text_encoder_2 is not None and self.tokenizer_2 is not None:
            encoders.append(TextEncoder(self.tokenizer_2, self._text_encoder_2))
        return encode_texts(prompts, encoders, self.batch_size)

    def decode(self, latents: Array) -> npt.NDArray[np.uint8]:
        """Images as uint8 with shape (n, height, width, 3) of latents with shape (n, channels, height, width).

        Raises ``ArtefactError`` if the latents or the images hold values that aren't finite.
        """
        if not np.isfinite(latents).all():
            raise ArtefactError(
                f"{self.folder}: the denoised latents aren't finite, the unet or text_encoder is broken"
            )
        return to_uint8(self.decode_samples(latents))

    def decode_samples(self, latents: Array) -> Array:
        """What the VAE gives for latents, float32 with shape (n, 3, height, width): −1 is black, 1 is white."""
        return self._vae_decoder(latent_sample=latents / self._scaling_factor + self._shift_factor)

    def _denoised(
        self,
        requests: Sequence[Request],
        steps: int,
        guidance_scale: float | Sequence[float],
        progress: Progress | None,
        on_step: OnStep | None = None,
        prompt_embeds: Array | None = None,
    ) -> Iterator[Array]:
        """The final latents, batch by batch."""
        check_requests(requests, guidance_scale)
        self._edit_indices(requests)
        self._latents_of(requests)
        calls = len(self.scheduler.start(steps).timesteps)
        if not requests:
            return
        texts = self._texts(requests, prompt_embeds)
        scales = np.broadcast_to(np.asarray(guidance_scale, np.float64), len(requests)).tolist()
        starts = range(0, len(requests), self.batch_size)
        for batch, start in enumerate(starts):
            chosen = slice(start, start + self.batch_size)

            def report(done: int, total: int, before: int = batch * calls) -> None:
                if progress is not None:
                    progress(before + done, total * len(starts))

            denoising = self._begin(requests[chosen], steps, scales[chosen], texts.of(chosen))
            yield denoising.run(report, on_step)

    def _edit_indices(self, requests: Sequence[Request]) -> npt.NDArray[np.int64] | None:
        """Indices of the requests' edits, shape (n); None without a bank."""
        if self.bank is not None:
            return edit_indices(self.bank, [request.edit for request in requests])
        for request in requests:
            if request.edit not in (None, self.edit_id):
                raise UsageError(f"edit={request.edit!r}: {self.folder} holds no bank of edits, and not this one")
        return None

    def _latents_of(self, requests: Sequence[Request]) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of requests, which all ask for one size."""
        channels, own = self.latent_shape[0], self.image_shape[:2]
        # Traced at its own size, the UNet halves and doubles latents without padding them.
        multiple = self._upscaling * halvings(self._unet.config)
        asked = requested_size(requests, own, multiple)
        latents = (asked[0] // self._upscaling, asked[1] // self._upscaling)
        for component, name in ((self._unet, "sample"), (self._vae_decoder, "latent_sample")):
            check_fixed_shape(self.folder, component, name, latents, own, asked)
        return (channels, *latents)

    def predict(
        self,
        sample: Array,
        timestep: float,
        encoder_hidden_states: Array,
        edit_index: npt.NDArray[np.int64] | None = None,
        *,
        text_embeds: Array | None = None,
    ) -> Array:
        """The UNet's output, float32 with the shape of ``sample`` (b, c, h, w), for text embeddings (b, t, d).

        A bank needs ``edit_index``, for b rows or for b / 2, which guidance then repeats; SDXL the prompts' vectors,
        ``text_embeds`` with shape (b, p). An image's size is that of ``sample``.
        """
        height, width = (side * self._upscaling for side in sample.shape[2:])
        given = unet_inputs(self._unet, timestep, len(sample), (height, width), edit_index, text_embeds)
        return self._unet(sample=sample, encoder_hidden_states=encoder_hidden_states, **given)
