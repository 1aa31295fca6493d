"""Whether a RECE epoch is needed, judged by pictures (Gong et al., ECCV 2024, arXiv 2407.12383, §4.5).

Eq. 8 derives ``C'`` such that ``W_i T c' ≈ W_i c``: fed to the edited model in place of a prompt's embedding, it is to
bring the concept back. It does so exactly as far as pictures show it. So a few are generated from each concept's ``C'``
by the model that it was derived against, and a zero-shot detector counts those that show the concept. At 0 there is
nothing left for the epoch to erase.

Pictures come from DDIM with guidance against the empty prompt, which reads the edited weights too. The same seeds serve
every concept, epoch and edit, so that a difference between two counts is the edit's.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from excise.errors import ModelError, UsageError
from excise.eval.torch_runtime import TorchRuntime
from excise.serve.runtime import Request, initial_latents

#: Of DDIM, and of the guidance against the empty prompt.
STEPS, GUIDANCE_SCALE = 25, 7.5

#: From a weight's name and the original weight with shape (o, d), the edited weight.
Moved = Callable[[str, Tensor], Tensor]


class Detector(typing.Protocol):
    """What ``ClipDetector`` offers and a probe needs."""

    labels: tuple[str, ...]

    def detect(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
        """The index into ``labels`` of each image's top label, with shape (n,)."""
        ...


class EpochProbe:
    """Counts the pictures of a Stable Diffusion that show a concept when it reads embeddings in place of prompts.

    Args:
        pipeline: a diffusers ``StableDiffusionPipeline``, on the device and in the precision to run with. Its UNet's
            weights are moved while pictures are made, and put back. Its own scheduler and safety checker aren't used.
        detector: names what a picture shows.
        labels: those of the detector's labels that count as the concept.
        sites: names of the UNet's weights that an edit moves.
        images: pictures from each embedding; their seeds are 0, 1, …
        num_inference_steps: of DDIM.
        guidance_scale: against the empty prompt.
        batch_size: pictures denoised together.
        progress: show a bar on stderr.

    Raises:
        UsageError: another kind of pipeline, a number below 1, or labels that are none, all or not the detector's.
        ModelError: the UNet has no such site.
    """

    def __init__(
        self,
        pipeline: Any,
        detector: Detector,
        labels: Collection[str],
        sites: Sequence[str],
        *,
        images: int = 4,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
        batch_size: int = 16,
        progress: bool = True,
    ) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        if not isinstance(pipeline, StableDiffusionPipeline):
            kind = type(pipeline).__name__
            raise UsageError(f"epochs are judged by pictures of a StableDiffusionPipeline only, not of a {kind}")
        for name, value in (("images", images), ("num_inference_steps", num_inference_steps)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if unknown := [label for label in labels if label not in detector.labels]:
            raise UsageError(f"the detector has no label {unknown[0]!r}: build it with every label that counts")
        counted = np.isin(detector.labels, list(labels))
        if not counted.any() or counted.all():
            raise UsageError("a detector needs labels that count as the concept and others that don't")
        parameters = dict(pipeline.unet.named_parameters())
        if absent := [site for site in sites if site not in parameters]:
            raise ModelError(f"the pipeline's UNet has no weight {absent[0]}: load the model that the edit is for")
        parts = {
            **pipeline.components,
            # A configuration of another scheduler may lack clip_sample, and DDIM's default is for pixels, not latents.
            "scheduler": DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False),
            "safety_checker": None,
        }
        self._pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        self._runtime = TorchRuntime(self._pipeline, name="probe", batch_size=batch_size)
        self._detector, self._counted = detector, counted
        self._images, self._steps, self._scale = images, num_inference_steps, guidance_scale
        self._progress = progress
        self._parameters = {site: parameters[site] for site in sites}
        self._original = {site: weight.detach().clone() for site, weight in self._parameters.items()}
        with torch.no_grad():
            self._empty: Tensor = self._pipeline.encode_prompt([""], pipeline.device, 1, False)[0]

    def __call__(self, derived: Tensor, moved: Moved) -> float:
        """The share of pictures, from 0 to 1, whose top label counts as the concept.

        Args:
            derived: embeddings in place of prompts, one after the other, with shape (prompts · positions, d).
            moved: the edit that the model carries while the pictures are made.

        Raises:
            UsageError: ``derived`` isn't whole prompts of this model.
        """
        positions, dim = self._empty.shape[1:]
        if derived.ndim != 2 or derived.shape[1] != dim or not len(derived) or len(derived) % positions:
            raise UsageError(
                f"embeddings of shape {tuple(derived.shape)}: give all {positions} positions of each, ({dim},) wide"
            )
        embeddings = derived.reshape(-1, positions, dim).to(self._empty).repeat_interleave(self._images, 0)
        requests = [Request("", seed=number % self._images) for number in range(len(embeddings))]
        with self._edited(moved):
            images = self._generate(embeddings, requests)
        return float(self._counted[self._detector.detect(images)].mean())

    def _generate(self, embeddings: Tensor, requests: Sequence[Request]) -> npt.NDArray[np.uint8]:
        """Images as uint8 with shape (n, height, width, 3)."""
        size = self._runtime.batch_size
        starts = range(0, len(requests), size)
        pictures = []
        with tqdm(total=len(starts) * self._steps, desc="pictures", unit="step", disable=not self._progress) as bar:

            def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                bar.update()
                return tensors

            for start in starts:
                batch = embeddings[start : start + size]
                latents = initial_latents(requests[start : start + size], self._runtime.latent_shape)
                output = self._pipeline(
                    prompt_embeds=batch,
                    negative_prompt_embeds=self._empty.expand_as(batch),
                    height=self._runtime.image_size[0],
                    width=self._runtime.image_size[1],
                    num_inference_steps=self._steps,
                    guidance_scale=self._scale,
                    latents=torch.from_numpy(latents).to(batch),
                    output_type="np",
                    callback_on_step_end=step_done,
                )
                pictures.append(np.round(output.images * 255).astype(np.uint8))
        return np.concatenate(pictures)

    @contextmanager
    def _edited(self, moved: Moved) -> Iterator[None]:
        """The UNet carries an edit inside, and its own weights again afterwards, whatever happens."""
        try:
            self._carry({site: moved(site, weight) for site, weight in self._original.items()})
            yield
        finally:
            self._carry(self._original)

    @torch.no_grad()
    def _carry(self, weights: dict[str, Tensor]) -> None:
        for site, parameter in self._parameters.items():
            parameter.copy_(weights[site])
