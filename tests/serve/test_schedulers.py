"""The numpy schedulers take the same trajectories as diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import ModelError, UsageError
from excise.serve.schedulers import SCHEDULERS, read_scheduler, scheduler_from_config

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers' Euler scheduler calls np.array(torch.Tensor)
)

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STEPS = (1, 2, 3, 4, 7, 25, 50)


def scheduler_config(name: str, **options: Any) -> dict[str, Any]:
    """A Stable Diffusion configuration with some options changed."""
    config = {"_class_name": name, **STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False}
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    return {**config, **options}


def compare(config: dict[str, Any], steps: int, tolerance: float = 5e-6) -> None:
    """Runs both schedulers on a fake model and compares every step.

    The difference is absolute, or relative to the latents where they are larger than 1 (they grow to 29). The
    largest that was measured is 2.8e-6 (PNDM, trailing, 50 steps).
    """
    import diffusers
    import torch

    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs.set_timesteps(steps)
    ours = scheduler_from_config(config).start(steps)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    assert ours.timesteps.dtype == theirs.timesteps.numpy().dtype
    assert ours.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    noise = np.random.default_rng(0).standard_normal((2, 4, 3, 5), np.float32)
    latents, expected = noise * ours.init_noise_sigma, torch.from_numpy(noise) * theirs.init_noise_sigma
    for index, timestep in enumerate(theirs.timesteps):
        seen, theirs_seen = ours.scale_model_input(latents, index), theirs.scale_model_input(expected, timestep)
        np.testing.assert_allclose(seen, theirs_seen.numpy(), rtol=tolerance, atol=tolerance)
        output = np.tanh(seen + np.float32(0.1))
        latents = ours.step(output, index, latents)
        expected = theirs.step(torch.tanh(theirs_seen + 0.1), timestep, expected).prev_sample
        assert latents.dtype == np.float32
        np.testing.assert_allclose(latents, expected.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_equal_to_diffusers(name: str, prediction: str, spacing: str, steps: int) -> None:
    compare(scheduler_config(name, prediction_type=prediction, timestep_spacing=spacing), steps)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_beta_schedules(name: str, schedule: str) -> None:
    compare(scheduler_config(name, beta_schedule=schedule, beta_start=0.0001, beta_end=0.02), 25)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_trained_betas(name: str) -> None:
    compare(scheduler_config(name, trained_betas=[0.01] * 100, num_train_timesteps=100), 10)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_alpha_set_to_one(name: str, steps_offset: int) -> None:
    compare(scheduler_config(name, set_alpha_to_one=True, steps_offset=steps_offset), 50)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_sample_prediction(name: str) -> None:
    compare(scheduler_config(name, prediction_type="sample"), 50)


def test_clipped_sample() -> None:
    compare(scheduler_config("DDIMScheduler", clip_sample=True, clip_sample_range=0.7), 50)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr(name: str, spacing: str) -> None:
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    # with Euler, σ falls from 4096 to 105 in one step: 1.4e-5 was measured
    compare(scheduler_config(name, **options), 25, tolerance=3e-5)


def test_final_sigma() -> None:
    compare(scheduler_config("EulerDiscreteScheduler", final_sigmas_type="sigma_min"), 25)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_defaults_are_diffusers(name: str) -> None:
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    compare({"_class_name": name, **options}, 10)


def test_runs_share_nothing() -> None:
    scheduler = scheduler_from_config(scheduler_config("PNDMScheduler"))
    output, sample = np.ones((1, 4, 2, 2), np.float32), np.zeros((1, 4, 2, 2), np.float32)
    first, second = scheduler.start(10), scheduler.start(10)
    alone = [first.step(output * index, index, sample) for index in range(5)]
    third = scheduler.start(10)
    for index in range(5):
        second.step(output, index, sample)
        np.testing.assert_array_equal(third.step(output * index, index, sample), alone[index])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "HeunDiscreteScheduler"}, ["HeunDiscreteScheduler", "DDIMScheduler", "PNDMScheduler"]),
        ({}, ["None", "EulerDiscreteScheduler"]),
        (scheduler_config("DDIMScheduler", beta_schedule="sigmoid"), ["beta_schedule='sigmoid'", "scaled_linear"]),
        (scheduler_config("DDIMScheduler", thresholding=True), ["DDIMScheduler", "thresholding=True", "False"]),
        (scheduler_config("DDIMScheduler", timestep_spacing="random"), ["timestep_spacing='random'", "leading"]),
        (scheduler_config("PNDMScheduler", prediction_type="sample"), ["prediction_type='sample'", "v_prediction"]),
        (scheduler_config("PNDMScheduler", skip_prk_steps=False), ["skip_prk_steps=False", "True"]),
        ({"_class_name": "PNDMScheduler"}, ["skip_prk_steps=False", "True"]),
        (scheduler_config("EulerDiscreteScheduler", use_karras_sigmas=True), ["use_karras_sigmas=True", "False"]),
        (scheduler_config("EulerDiscreteScheduler", timestep_type="continuous"), ["timestep_type", "discrete"]),
        (scheduler_config("DDIMScheduler", beta_start="a"), ["beta_start='a'", "number"]),
        (scheduler_config("DDIMScheduler", beta_end=3.0), ["betas", "between 0 and 1"]),
        (scheduler_config("DDIMScheduler", steps_offset=0.5), ["steps_offset=0.5", "integer"]),
        (scheduler_config("DDIMScheduler", clip_sample="no"), ["clip_sample='no'"]),
        (scheduler_config("DDIMScheduler", trained_betas=[0.1]), ["trained_betas", "1000"]),
    ],
)
def test_unsupported_is_an_error(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        scheduler_from_config(config)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("steps", [0, -3, 1000, 1001, 2.5, True])
def test_steps_outside_the_schedule(steps: Any) -> None:
    with pytest.raises(UsageError, match="inference steps"):
        scheduler_from_config(scheduler_config("DDIMScheduler")).start(steps)


def test_options_of_other_schedulers_are_ignored() -> None:
    config = scheduler_config("DDIMScheduler")
    assert scheduler_from_config({**config, "solver_order": 2, "skip_prk_steps": True}) is not None


def test_read_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(scheduler_config("PNDMScheduler")))
    assert len(read_scheduler(file).start(50).timesteps) == 51
    file.write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        read_scheduler(file)
    file.write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        read_scheduler(file)
    with pytest.raises(ModelError, match="can't be read"):
        read_scheduler(tmp_path / "missing.json")
