"""Noise schedules of diffusion models, read from a diffusers ``scheduler_config.json``.

Symbols: β_t are the variances of the forward process, ᾱ_t = Π_{s ≤ t} (1 − β_s) (``alphas_cumprod``), T the number of
training timesteps. The tables are float32 with the products taken in float64, as PyTorch does, so that a trajectory
stays within rounding of diffusers' own.

Options that a scheduler doesn't have are ignored, as diffusers does. An option that it has and that isn't implemented
here is a ``ModelError``, never a different picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from excise.errors import ModelError, UsageError

Array: TypeAlias = npt.NDArray[np.float32]
Config: TypeAlias = Mapping[str, Any]  #: a parsed ``scheduler_config.json``
Spacing = Literal["leading", "linspace", "trailing"]
Prediction = Literal["epsilon", "v_prediction", "sample"]

SPACINGS = ("leading", "linspace", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MAX_BETA = 0.999  #: caps the cosine schedule, where ᾱ_T = 0 would need β_T = 1


def unsupported(config: Config, option: str, supported: Sequence[object]) -> ModelError:
    """The error for an option whose value isn't implemented."""
    name = config.get("_class_name", "the scheduler")
    values = ", ".join(repr(value) for value in supported)
    return ModelError(f"{name}: {option}={config.get(option)!r} isn't supported, only {values}")


def choice(config: Config, option: str, default: str, supported: Sequence[str]) -> str:
    """The value of an option that takes one of some names. Raises ``ModelError`` for any other."""
    value = config.get(option, default)
    if value not in supported:
        raise unsupported({**config, option: value}, option, supported)
    return cast(str, value)


def flag(config: Config, option: str, default: bool) -> bool:
    """The value of a yes-or-no option; null is no. Raises ``ModelError`` for anything else."""
    value = config.get(option, default)
    if value is not None and not isinstance(value, bool):
        raise unsupported(config, option, (True, False))
    return bool(value)


def number(config: Config, option: str, default: float) -> float:
    """The value of a numeric option. Raises ``ModelError`` for anything else."""
    value = config.get(option, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise unsupported(config, option, ("a finite number",))
    return float(value)


def whole(config: Config, option: str, default: int, minimum: int) -> int:
    """The value of an integer option. Raises ``ModelError`` for anything else or less than ``minimum``."""
    value = config.get(option, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise unsupported(config, option, (f"an integer from {minimum}",))
    return value


def refuse(config: Config, neutral: Mapping[str, object]) -> None:
    """Raises ``ModelError`` if any of the options in ``neutral`` is set to something else than its neutral value."""
    for option, value in neutral.items():
        if config.get(option, value) not in (value, None):
            raise unsupported(config, option, (value,))


def prediction_type(config: Config, supported: Sequence[Prediction]) -> Prediction:
    """What the model predicts: the noise, the velocity or the clean sample."""
    return cast(Prediction, choice(config, "prediction_type", "epsilon", supported))


def timestep_spacing(config: Config, default: Spacing) -> Spacing:
    """How the inference timesteps are spread over the training timesteps (Lin et al. 2024, table 2)."""
    return cast(Spacing, choice(config, "timestep_spacing", default, SPACINGS))


def train_timesteps(config: Config) -> int:
    """T, the number of training timesteps."""
    return whole(config, "num_train_timesteps", 1000, minimum=1)


def betas(config: Config) -> Array:
    """β_t with shape (T,). Raises ``ModelError`` for a schedule that isn't supported or a β outside [0, 1]."""
    steps = train_timesteps(config)
    if config.get("trained_betas") is not None:
        try:
            values = np.asarray(config["trained_betas"], np.float64)
        except (TypeError, ValueError):
            values = np.empty(0)
        if values.shape != (steps,):
            raise unsupported({**config, "trained_betas": "…"}, "trained_betas", (f"a list of {steps} numbers",))
    else:
        schedule = choice(config, "beta_schedule", "linear", BETA_SCHEDULES)
        start, end = number(config, "beta_start", 0.0001), number(config, "beta_end", 0.02)
        if schedule == "linear":
            values = np.linspace(start, end, steps)
        elif schedule == "scaled_linear":
            roots = np.linspace(max(start, 0.0) ** 0.5, max(end, 0.0) ** 0.5, steps, dtype=np.float32)
            values = (roots**2).astype(np.float64)
        else:
            # Nichol & Dhariwal 2021, eq. 17: ᾱ(t) = cos²((t/T + 0.008) / 1.008 · π/2)
            alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            values = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ModelError(
            f"{config.get('_class_name', 'the scheduler')}: betas run from {values.min()} to {values.max()}, "
            "they have to lie between 0 and 1: check beta_start, beta_end and trained_betas"
        )
    result = values.astype(np.float32)
    return zero_terminal_snr(result) if flag(config, "rescale_betas_zero_snr", False) else result


def zero_terminal_snr(values: Array) -> Array:
    """β_t with shape (T,), shifted and scaled so that ᾱ_T = 0 (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(cumulative(values))
    first, last = root[0].copy(), root[-1].copy()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return np.float32(1) - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def cumulative(values: Array) -> Array:
    """ᾱ_t with shape (T,) of β_t with shape (T,)."""
    return np.cumprod(np.float32(1) - values, dtype=np.float64).astype(np.float32)


def alphas_cumprod(config: Config) -> Array:
    """ᾱ_t with shape (T,) of a scheduler's configuration. Raises ``ModelError`` as ``betas`` does."""
    return cumulative(betas(config))


def check_steps(num_inference_steps: int, total: int) -> None:
    """Raises ``UsageError`` unless there are between 1 and T steps."""
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int | np.integer):
        raise UsageError(f"{num_inference_steps!r} inference steps: give an integer")
    if not 1 <= num_inference_steps <= total:
        raise UsageError(f"{num_inference_steps} inference steps: this model takes 1 to {total}")


def spaced(spacing: Spacing, total: int, num_inference_steps: int, offset: int) -> npt.NDArray[np.float64]:
    """Inference timesteps, descending and not yet rounded for ``linspace``: shape (num_inference_steps,).

    Raises ``UsageError`` for a number of steps outside 1 to T, or one that the offset pushes past T − 1.
    """
    check_steps(num_inference_steps, total)
    if spacing == "linspace":
        return np.linspace(0, total - 1, num_inference_steps)[::-1].copy()
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / num_inference_steps)) - 1
    ratio = total // num_inference_steps
    timesteps = np.arange(num_inference_steps, dtype=np.float64)[::-1] * ratio + offset
    if timesteps[0] >= total:
        raise UsageError(
            f"{num_inference_steps} inference steps with steps_offset={offset} start at timestep {timesteps[0]:.0f}, "
            f"after the last of the {total} trained ones: take fewer steps"
        )
    return timesteps
