"""The families that can be exported: what each denoiser reads, and which of its weights an edit can move.

A denoiser's inputs have the same names in diffusers and in Optimum's ONNX. What is made of the prompt comes from the
pipeline's own ``encode_prompt``, by its place in what that returns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from excise.errors import ModelError
from excise.export.parity import TIMESTEPS, DenoiserInputs, random_latents
from excise.export.quiet import quiet

#: Parity is measured on latents of at most this side (an image of 128 × 128), unless shapes are fixed: it compares
#: weights and graphs, which don't depend on the size, and sixteen times faster than an image of 512 × 512.
LARGEST: Final = 16
#: Scores of a picture's aesthetics that the refiner is asked for, in diffusers' pipelines.
_AESTHETIC_SCORE: Final = 6.0
_GUIDANCE: Final = 3.5

_CROSS_ATTENTION: Final = r".+\.attn2\.to_[kv]\.weight"
_EMBEDDERS: Final = r"context_embedder\.weight|time_text_embed\.text_embedder\.linear_1\.weight"
_UNGUIDED: Final = {"do_classifier_free_guidance": False}


@dataclass(frozen=True)
class Denoiser:
    """One family.

    Attributes:
        title: For messages.
        pipelines: Classes of the pipeline.
        component: Folder of the denoiser.
        needs: Components that a pipeline may lack, but not to be exported.
        text: Each input that comes from the prompt, and its place in what ``encode_prompt`` returns.
        arguments: Of ``encode_prompt``, beside those that every family has.
        sites: Names of the weights that read the text, as a regular expression.
        latents: Name of the input that is denoised.
        packed: Whether the latents are rows of 2 × 2 patches, with their places in ``img_ids``.
        patch: Latents that images' sides must be whole multiples of.
        lengths: Tokens that a text encoder is given, where that isn't what its tokenizer says.
        time_scale: The denoiser's timestep for the schedule's timestep 1.
        addition: The UNet's ``addition_embed_type``.
    """

    title: str
    pipelines: tuple[str, ...]
    component: Literal["unet", "transformer"]
    needs: tuple[str, ...]
    text: Mapping[str, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sites: str = _CROSS_ATTENTION
    latents: str = "sample"
    packed: bool = False
    patch: int = 1
    lengths: Mapping[str, int] = field(default_factory=dict)
    time_scale: float = 1.0
    addition: str | None = None

    def sites_of(self, denoiser: Any) -> tuple[str, ...]:
        """Names of the torch denoiser's weights that read the text, in the order of its parameters."""
        return tuple(name for name, _ in denoiser.named_parameters() if re.fullmatch(self.sites, name))


DENOISERS: Final = (
    Denoiser(
        title="Stable Diffusion 1 and 2",
        pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        component="unet",
        needs=("text_encoder", "tokenizer"),
        text={"encoder_hidden_states": 0},
        arguments=_UNGUIDED,
    ),
    Denoiser(
        title="Stable Diffusion XL and its refiner",
        pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        component="unet",
        needs=("text_encoder_2", "tokenizer_2"),
        text={"encoder_hidden_states": 0, "text_embeds": 2},
        arguments=_UNGUIDED,
        addition="text_time",
    ),
    Denoiser(
        title="Stable Diffusion 3",
        pipelines=("StableDiffusion3Pipeline",),
        component="transformer",
        needs=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        text={"encoder_hidden_states": 0, "pooled_projections": 2},
        arguments={"prompt_2": None, "prompt_3": None, **_UNGUIDED},
        sites=_EMBEDDERS,
        latents="hidden_states",
        patch=2,
        lengths={"text_encoder_3": 256},
    ),
    Denoiser(
        title="Flux",
        pipelines=("FluxPipeline",),
        component="transformer",
        needs=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        text={"encoder_hidden_states": 0, "pooled_projections": 1, "txt_ids": 2},
        arguments={"prompt_2": None},
        sites=_EMBEDDERS,
        latents="hidden_states",
        packed=True,
        patch=2,
        lengths={"text_encoder_2": 512},
        time_scale=1e-3,
    ),
)


def family_of(model: Any, pipeline: str) -> Denoiser:
    """The family of a pipeline by its class's name; ``model`` is for the message.

    Raises:
        ModelError: There is none: the pipeline can't be exported.
    """
    for family in DENOISERS:
        if pipeline in family.pipelines:
            return family
    titles = ", ".join(family.title for family in DENOISERS)
    raise ModelError(f"{model} is a {pipeline}, which can't be exported to ONNX: {titles} can")


def check_exportable(model: Any, pipe: Any) -> Denoiser:
    """The family of a loaded pipeline, whose parts are all there and read nothing that isn't fed.

    Raises:
        ModelError: A component is missing, or the UNet reads more than the family's.
    """
    family = family_of(model, type(pipe).__name__)
    for name in (*family.needs, family.component):
        if getattr(pipe, name, None) is None:
            raise ModelError(f"{model} has no {name}: {family.title} can't be exported without it")
    config = getattr(pipe, family.component).config
    expected = {
        "addition_embed_type": family.addition,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
    }
    for option, wanted in expected.items():
        if (value := getattr(config, option, None)) != wanted:
            raise ModelError(
                f"{model} has a denoiser with {option} {value!r}, which can't be exported: "
                f"{family.title} has {wanted!r}"
            )
    return family


def encode(pipe: Any, family: Denoiser, prompts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """What the pipeline makes of ``prompts`` for its denoiser: an array by input, one row a prompt.

    ``txt_ids`` alone has a row for each token.
    """
    import torch

    with quiet(), torch.no_grad():
        made = pipe.encode_prompt(prompt=list(prompts), device="cpu", num_images_per_prompt=1, **family.arguments)
    return {name: made[place].detach().float().numpy() for name, place in family.text.items()}


def make_inputs(
    pipe: Any,
    family: Denoiser,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    timesteps: Sequence[int] = TIMESTEPS,
    size: tuple[int, int] | None = None,
) -> DenoiserInputs:
    """Everything that a family's denoiser reads for ``prompts``: seeded normal latents, one for each, and the rest.

    Args:
        pipe: The pipeline, for its text encoders and its denoiser's configuration.
        family: The pipeline's.
        prompts: One row each.
        seed: Of the latents.
        timesteps: Of the schedule.
        size: Height and width of the latents; by default the denoiser's own, up to ``LARGEST``.
    """
    config = getattr(pipe, family.component).config
    text = encode(pipe, family, prompts)
    height, width = size or _own_size(config)
    count = len(prompts)
    others: dict[str, NDArray[Any]] = {name: array for name, array in text.items() if name != "encoder_hidden_states"}
    if family.packed:
        shape: tuple[int, ...] = (count, (height // 2) * (width // 2), config.in_channels)
        others["img_ids"] = _places(height // 2, width // 2)
        if config.guidance_embeds:
            others["guidance"] = np.full(count, _GUIDANCE, np.float32)
    else:
        shape = (count, config.in_channels, height, width)
    if family.addition == "text_time":
        others["time_ids"] = np.tile(_sizes(pipe, height, width), (count, 1))
    return DenoiserInputs(
        sample=random_latents(seed, shape),
        timesteps=tuple(family.time_scale * timestep for timestep in timesteps),
        encoder_hidden_states=text["encoder_hidden_states"],
        others=others,
        latents=family.latents,
    )


def _own_size(config: Any) -> tuple[int, int]:
    """Height and width of the latents that a denoiser was made for, each at most ``LARGEST``."""
    side = getattr(config, "sample_size", None) or LARGEST
    height, width = (side, side) if isinstance(side, int) else side
    return min(height, LARGEST), min(width, LARGEST)


def _sizes(pipe: Any, height: int, width: int) -> NDArray[np.float32]:
    """SDXL's ``time_ids`` of an image that is neither scaled nor cut; the refiner's end with a score."""
    image = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
    asked = getattr(pipe.config, "requires_aesthetics_score", False)
    return np.array([*image, 0, 0, *((_AESTHETIC_SCORE,) if asked else image)], np.float32)


def _places(rows: int, columns: int) -> NDArray[np.float32]:
    """Flux's ``img_ids``: (0, row, column) of each patch."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.stack([np.zeros_like(row), row, column], axis=1).astype(np.float32)
