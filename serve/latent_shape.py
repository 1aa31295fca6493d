"""The latents of an exported pipeline's images: their shape, and by what they are scaled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from excise.errors import ModelError, UsageError
from excise.serve.onnx_component import OnnxComponent


def latent_shape(unet: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the latents. Raises ``ModelError`` for a UNet that isn't text-to-image."""
    channels, size = unet.get("in_channels"), unet.get("sample_size")
    if channels != vae.get("latent_channels", channels):
        raise ModelError(
            f"unet/config.json has in_channels={channels}, the VAE {vae['latent_channels']} latent channels: "
            "inpainting and image-to-image models aren't supported here: export and excise patch take them, serve the "
            "ONNX files by another pipeline"
        )
    if vae.get("latents_mean") is not None:
        raise ModelError("vae_decoder/config.json has latents_mean: latents that are normalised aren't supported here")
    sides = size if isinstance(size, list) else [size, size]
    if not all(isinstance(value, int) and value > 0 for value in (channels, *sides)) or len(sides) != 2:
        raise ModelError(f"unet/config.json has in_channels={channels!r} and sample_size={size!r}: give both")
    return (int(channels), int(sides[0]), int(sides[1]))  # type: ignore[arg-type]


def halvings(config: dict[str, Any]) -> int:
    """By what a UNet or a VAE shrinks its input's sides at its narrowest: 2 for each of its levels but one."""
    return int(2 ** (len(config.get("block_out_channels") or [0]) - 1))


def positive(config: dict[str, Any], option: str, default: float) -> float:
    """A positive number of the VAE's configuration. Raises ``ModelError`` for anything else."""
    value = config.get(option, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise ModelError(f"vae_decoder/config.json has {option}={value!r}: give a positive number")
    return float(value)


def check_fixed_shape(
    folder: Path,
    component: OnnxComponent,
    name: str,
    latents: tuple[int, int],
    own: tuple[int, int],
    asked: tuple[int, int],
) -> None:
    """Whether the input ``name`` of a component takes latents of that (height, width).

    Raises ``UsageError``, which names the sizes in pixels: the export's ``own`` and the one that is ``asked`` for.
    """
    fixed = (component.width(name, 2), component.width(name, 3))
    if any(side not in (None, wanted) for side, wanted in zip(fixed, latents, strict=True)):
        raise UsageError(
            f"{folder} was exported for images of {own[1]} x {own[0]} pixels alone, not of {asked[1]} x {asked[0]}: "
            "ask for that size, or export it with free shapes"
        )
