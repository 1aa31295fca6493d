"""What a UNet is fed with beside latents and hidden states, by the inputs that it declares."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.onnx_metadata import EDIT_INDEX
from excise.serve.noise_schedule import Array
from excise.serve.onnx_component import OnnxComponent
from excise.serve.text_conditioning import time_ids


def unet_inputs(
    unet: OnnxComponent,
    timestep: float,
    images: int,
    size: tuple[int, int],
    edit_index: npt.NDArray[np.int64] | None,
    text_embeds: Array | None,
) -> dict[str, npt.NDArray[Any]]:
    """Inputs by name for one call.

    Args:
        unet: What is called. Its ``timestep`` is a scalar in Optimum's exports and a vector in some others.
        timestep: One for all rows.
        images: Rows of the batch, b.
        size: (height, width) of the images in pixels, which SDXL's reads.
        edit_index: Of a bank, for b rows or for a part of them, which guidance then repeats.
        text_embeds: SDXL's vectors with shape (b, p).

    Raises:
        UsageError: the UNet needs vectors, and there are none.
    """
    shape = () if unet.rank("timestep") == 0 else (unet.width("timestep", 0) or images,)
    found: dict[str, npt.NDArray[Any]] = {"timestep": np.full(shape, timestep)}
    if edit_index is not None:
        found[EDIT_INDEX] = np.tile(edit_index, images // len(edit_index))
    if unet.takes("text_embeds"):
        if text_embeds is None:
            raise UsageError("SDXL's UNet reads the prompts' vectors besides their hidden states: give text_embeds")
        found |= {"text_embeds": text_embeds, "time_ids": time_ids(images, *size)}
    return found
