"""Parity of Stable Diffusion's UNet on given text states, and a pipeline's text states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.export.parity import TIMESTEPS, DenoiserInputs, onnx_outputs, random_latents, torch_outputs
from excise.export.quiet import quiet
from excise.parity import Parity, parity


def make_inputs(
    unet: Any, encoder_hidden_states: NDArray[Any], *, seed: int = 0, timesteps: Sequence[int] = TIMESTEPS
) -> DenoiserInputs:
    """Seeded normal latents of the UNet's own size, one for each text state (n, t, d)."""
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    sample = random_latents(seed, (len(encoder_hidden_states), unet.config.in_channels, height, width))
    return DenoiserInputs(sample, tuple(timesteps), encoder_hidden_states.astype(np.float32))


def text_states(pipe: Any, prompts: Sequence[str]) -> NDArray[np.float32]:
    """The pipeline's own text states of ``prompts``, shape (n, t, d)."""
    with quiet():
        states = pipe.encode_prompt(
            prompt=list(prompts), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
    result: NDArray[np.float32] = states.detach().float().numpy()
    return result


def unet_parity(
    base_unet: Any,
    edited_unet: Any,
    onnx_path: Path,
    encoder_hidden_states: NDArray[Any],
    *,
    seed: int = 0,
    timesteps: Sequence[int] = TIMESTEPS,
) -> Parity:
    """Compare an exported edited UNet with the edited torch UNet, relative to what the edit changed.

    Args:
        base_unet: The unedited torch UNet.
        edited_unet: The edited one.
        onnx_path: The exported edited one.
        encoder_hidden_states: Text states of a realistic norm, shape (n, t, d), e.g. from ``text_states``.
        seed: Of the latents.
        timesteps: Run with every text state.

    Raises:
        ArtefactError: The ONNX file can't be run.
        NumericsError: The edit changes none of the outputs, or some aren't finite.
    """
    inputs = make_inputs(edited_unet, encoder_hidden_states, seed=seed, timesteps=timesteps)
    return parity(torch_outputs(base_unet, inputs), torch_outputs(edited_unet, inputs), onnx_outputs(onnx_path, inputs))
