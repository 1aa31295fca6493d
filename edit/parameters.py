"""A method's own figures: what a recipe's ``parameters`` may hold, by method, with the published values as defaults.

Nothing here needs PyTorch: ``excise edit --explain`` names every figure without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Frozen(BaseModel):
    """A part of a recipe: no unknown fields, no conversions, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _whole(value: object) -> object:
    # The command line and YAML's 1e3 give floats.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class NoParameters(Frozen):
    """A method whose figures are all fields of the recipe."""


class SpeedParameters(Frozen):
    """SPEED's own figures, as published for nudity."""

    rho: float = Field(default=0.7, gt=0, description="a positive number: ρ of M = (C₁C₁ᵀP + ρI)⁻¹")
    lambda_: float = Field(
        default=0.5, gt=0, alias="lambda", description="a positive number: λ of the null prompt's constraint"
    )
    null_threshold: float = Field(
        default=0.1, gt=0, description="a positive number: singular values below it are the null space"
    )


class TrainingParameters(Frozen):
    """What every trained method has."""

    iterations: Whole = Field(default=200, ge=1, le=10**7, description="a whole number from 1: steps of the optimiser")
    learning_rate: float = Field(default=5e-5, gt=0, description="a positive number: the optimiser's step size")
    batch_size: Whole = Field(default=1, ge=1, le=4096, description="a whole number from 1: samples in a step")
    guidance_scale: float = Field(
        default=3.0, ge=0, description="a number of 0 or more: guidance of the images that the original model draws"
    )
    num_inference_steps: Whole = Field(
        default=50, ge=1, le=1000, description="a whole number from 1 to 1000: DDIM steps of those images"
    )
    seed: Whole = Field(default=0, ge=0, lt=2**53, description="a whole number of 0 or more: decides every draw")


class EsdParameters(TrainingParameters):
    """ESD's, as its published code has them for every variant."""

    negative_guidance: float = Field(
        default=2.0, gt=0, description="a positive number: η, how far the prediction is pushed away from the concept"
    )


class CaParameters(TrainingParameters):
    """CA's, as published for styles and objects: 2e-6, times the batch."""

    iterations: Whole = Field(default=100, ge=1, le=10**7, description="a whole number from 1: steps of the optimiser")
    learning_rate: float = Field(default=1.6e-5, gt=0, description="a positive number: the optimiser's step size")
    batch_size: Whole = Field(default=8, ge=1, le=4096, description="a whole number from 1: samples in a step")
    guidance_scale: float = Field(
        default=6.0, ge=0, description="a number of 0 or more: guidance of the images that the original model draws"
    )
    images: Whole = Field(
        default=200, ge=1, le=10**6, description="a whole number from 1: images of the targets to train on"
    )


class CaFullParameters(CaParameters):
    """CA's where all weights are trained: 2e-7, times the batch."""

    iterations: Whole = Field(default=400, ge=1, le=10**7, description="a whole number from 1: steps of the optimiser")
    learning_rate: float = Field(default=1.6e-6, gt=0, description="a positive number: the optimiser's step size")


class SaParameters(TrainingParameters):
    """SA's, as published for a celebrity: 1e-5 times 4 GPUs of 4 samples; 200 passes over 1000 surrogate images."""

    iterations: Whole = Field(
        default=12_500, ge=1, le=10**7, description="a whole number from 1: steps of the optimiser"
    )
    learning_rate: float = Field(default=1.6e-4, gt=0, description="a positive number: the optimiser's step size")
    batch_size: Whole = Field(default=16, ge=1, le=4096, description="a whole number from 1: samples in a step")
    guidance_scale: float = Field(
        default=7.5, ge=0, description="a number of 0 or more: guidance of the images that the original model draws"
    )
    gamma: float = Field(default=1.0, ge=0, description="a number of 0 or more: γ, the weight of the replayed images")
    lambda_: float = Field(
        default=50.0, ge=0, alias="lambda", description="a number of 0 or more: λ, the weight of the Fisher term"
    )
    surrogate_images: Whole = Field(
        default=1000, ge=1, le=10**6, description="a whole number from 1: images of the targets"
    )
    replay_images: Whole = Field(
        default=5000,
        ge=1,
        le=10**6,
        description="a whole number from 1: images of the kept prompts, replayed and behind the Fisher information",
    )
    fisher_timesteps: Whole = Field(
        default=1000,
        ge=1,
        le=10**4,
        description="a whole number from 1: timesteps of each image behind the Fisher information, at most all",
    )


#: What ``parameters`` may hold, by method.
PARAMETERS: Mapping[str, type[Frozen]] = {
    "rece": NoParameters,
    "uce": NoParameters,
    "speed": SpeedParameters,
    "dp": NoParameters,
    "trce1": NoParameters,
    "leace": NoParameters,
    "esd-x": EsdParameters,
    "esd-u": EsdParameters,
    "esd-full": EsdParameters,
    "ca": CaParameters,
    "ca-full": CaFullParameters,
    "sa": SaParameters,
    "sa-u": SaParameters,
}

#: The methods that train the denoiser; the others are closed forms.
TRAINED: frozenset[str] = frozenset(
    name for name, figures in PARAMETERS.items() if issubclass(figures, TrainingParameters)
)
