"""A tiny random Stable Diffusion as what the trained methods see: a denoiser, and embeddings of some prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.edit.denoiser import Denoiser, load_unet
from excise.edit.families import family_of
from excise.edit.text import load_encoder


def denoiser_of(folder: Path, weights: Callable[[Any], tuple[str, ...]], *, kind: str = "epsilon") -> Denoiser:
    """The folder's UNet with some of its weights to train, as a model of another prediction type if asked."""
    unet, scheduler = load_unet(folder)
    scheduler.register_to_config(prediction_type=kind)
    return Denoiser(unet, scheduler, weights(unet))


def embedded(folder: Path, *prompts: str) -> Tensor:
    """Text embeddings with shape (n, t, d), float32."""
    encoder = load_encoder(folder, family_of(folder))
    return torch.stack([each["text"][0].tokens.float() for each in encoder.embed(list(prompts))])
