"""A tiny random SDXL with everything in which the real one differs from Stable Diffusion 1: 16 × 16 images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from excise.editfile import Edit
from excise.serve.runtime import Request, initial_latents
from tests.edit import tiny_models
from tests.random_edits import random_edit

#: By which the text encoders' random weights are multiplied.
SCALE = 0.3


def tiny_xl() -> diffusers.StableDiffusionXLPipeline:
    """Its second tokenizer pads with "!", its scheduler is Euler's, and its two text encoders have other widths."""
    place = Path(tiny_models.__file__).parents[2] / "demo" / "model" / "tokenizer"
    second = transformers.CLIPTokenizer.from_pretrained(place, pad_token="!")
    return diffusers.StableDiffusionXLPipeline(
        vae=tiny_models.vae(scaling_factor=0.13025),
        text_encoder=calmed(tiny_models.clip()),
        text_encoder_2=calmed(tiny_models.clip(tiny_models.CLIP_G, projection=20)),
        tokenizer=tiny_models.clip_tokenizer(),
        tokenizer_2=second,
        unet=tiny_models.unet(
            tiny_models.CLIP_L + tiny_models.CLIP_G,
            sample_size=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )


def calmed(encoder: Any) -> Any:
    """A text encoder with smaller weights.

    SDXL reads hidden states that no norm has scaled: of these random ones they are so large that attention multiplies
    rounding by hundreds.
    """
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.ndim > 1:
                weight.mul_(SCALE)
    return encoder


_made: dict[str, Path] = {}


def model_and_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The saved pipeline and its export without an edit, made once a run. Not to be changed by tests."""
    if not _made:
        from excise.export.onnx_export import export_pipeline

        place = tmp_path_factory.mktemp("xl")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, by the dozen
            tiny_models.build(tiny_xl, place / "model")
            export_pipeline(place / "model", place / "onnx")
        _made.update(model=place / "model", onnx=place / "onnx")
    return _made["model"], _made["onnx"]


def edit_of(model: Path) -> Edit:
    """A random edit of all layers that read the text."""
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    return random_edit(
        {name: w for name, w in weights.items() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))},
        1,
        scale=0.3,
    )


def load(model: Path, **config: Any) -> Any:
    """diffusers' own pipeline, with other values of its configuration."""
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(**config)
    return pipeline


def own_call(pipeline: Any, request: Request, output_type: str, **settings: Any) -> Any:
    """What the pipeline makes of one request, called as by its users: an empty negative prompt isn't named."""
    scale = pipeline.vae_scale_factor
    height, width = request.height or 8 * scale, request.width or 8 * scale
    shape = (4, height // scale, width // scale)
    made = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt or None,
        height=height,
        width=width,
        latents=torch.from_numpy(initial_latents([request], shape)),
        output_type=output_type,
        **settings,
    ).images
    return made.numpy()[0] if output_type == "latent" else np.asarray(made[0])
