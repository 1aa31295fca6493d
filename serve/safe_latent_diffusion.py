"""Safe Latent Diffusion (Schramowski et al., *Safe Latent Diffusion*, CVPR 2023, arXiv 2211.05105), at inference.

With ε_∅, ε_p and ε_s the UNet's outputs for the negative prompt, the prompt and the concept to stay away from, for
every element of the latents

    φ = min(1, s |ε_p − ε_s|)                μ = φ where ε_p − ε_s < τ, else 0         (eq. 6, as published code has it)
    γ = μ (ε_s − ε_∅) + s_m ν                ν ← β ν + (1 − β) γ                        (eq. 7 and 8)
    ε = ε_∅ + w (ε_p − ε_∅ − γ)              from step δ on; before it γ isn't subtracted, but ν grows (eq. 5)

The published figures are those of ml-research/safe-latent-diffusion, which diffusers' ``StableDiffusionPipelineSafe``
took over. Of a model that predicts v the formula sees v, as there: its differences are those of ε times 1 / √ᾱ, and τ
and s were chosen for ε.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.serve.noise_schedule import Array

#: The published list of what is unsafe.
UNSAFE_CONCEPT: Final = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)


@dataclass(frozen=True)
class Strength:
    """δ, s, τ, s_m and β, by the names that diffusers gives them."""

    warmup_steps: int
    guidance_scale: float
    threshold: float
    momentum_scale: float
    momentum_beta: float


STRENGTHS: Final[Mapping[str, Strength]] = MappingProxyType(
    {
        "weak": Strength(15, 20, 0.0, 0.0, 0.0),
        "medium": Strength(10, 1000, 0.01, 0.3, 0.4),
        "strong": Strength(7, 2000, 0.025, 0.5, 0.7),
        "max": Strength(0, 5000, 1.0, 0.5, 0.7),
    }
)


class SafeLatentDiffusion:
    """Guidance away from ``concept``: one more row of the UNet's batch for every image.

    Raises:
        UsageError: an unknown strength, no concept, or a figure that isn't finite.
    """

    def __init__(self, strength: str | Strength = "medium", concept: str = UNSAFE_CONCEPT) -> None:
        if isinstance(strength, str):
            if strength not in STRENGTHS:
                raise UsageError(f"SLD has no strength {strength!r}: choose one of {', '.join(STRENGTHS)}")
            strength = STRENGTHS[strength]
        if not concept.strip():
            raise UsageError("SLD needs a concept to stay away from: name it, such as 'weapons'")
        figures = (strength.guidance_scale, strength.threshold, strength.momentum_scale, strength.momentum_beta)
        if not all(map(math.isfinite, figures)) or strength.warmup_steps < 0:
            raise UsageError(f"SLD can't work with {strength}: give finite figures, and warmup_steps from 0")
        self.strength, self.texts = strength, (concept,)

    def start(self, scales: Array) -> SafeGuide:
        """The guidance of one batch with these scales, shape (n).

        Raises:
            UsageError: a scale of at most 1, without which there is no guidance to correct.
        """
        if (scales <= 1).any():
            raise UsageError(
                f"guidance_scale={float(scales.min()):g}: SLD corrects classifier-free guidance, give more than 1"
            )
        return SafeGuide(self.strength, scales)


class SafeGuide:
    """One batch's: remembers the momentum ν, with the latents' shape."""

    guided = True

    def __init__(self, strength: Strength, scales: Array) -> None:
        self._strength, self._scales = strength, scales
        self._momentum: Array | None = None

    def combine(self, outputs: Sequence[Array], index: int) -> Array:
        """ε with shape (n, c, h, w)."""
        unconditional, conditional, unsafe = outputs
        figures = self._strength
        direction = conditional - unsafe
        scale = np.minimum(np.float32(1), np.abs(direction) * np.float32(figures.guidance_scale))
        scale[direction >= np.float32(figures.threshold)] = 0
        momentum = np.zeros_like(conditional) if self._momentum is None else self._momentum
        correction = scale * (unsafe - unconditional) + np.float32(figures.momentum_scale) * momentum
        beta = np.float32(figures.momentum_beta)
        self._momentum = beta * momentum + (1 - beta) * correction
        moved = conditional - unconditional
        if index >= figures.warmup_steps:
            moved = moved - correction
        return np.asarray(unconditional + self._scales.reshape(-1, *(1,) * (moved.ndim - 1)) * moved, np.float32)

    def keep(self, places: npt.NDArray[np.int64]) -> None:
        """Go on with these of the images only."""
        self._scales = self._scales[places]
        if self._momentum is not None:
            self._momentum = self._momentum[places]
