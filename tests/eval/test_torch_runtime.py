"""The torch runtime on a tiny random pipeline: its own images, from the shared latents, whatever the batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

from excise.errors import PromptTooLong, UsageError
from excise.eval.torch_runtime import TorchRuntime
from excise.serve.guidance import CLASSIFIER_FREE
from excise.serve.runtime import Request, initial_latents
from excise.serve.safe_latent_diffusion import SafeLatentDiffusion

REQUESTS = [Request("a gun", seed=1), Request("a cat", negative_prompt="a dog", seed=2), Request("", seed=1, index=5)]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)


@pytest.fixture(scope="module")
def runtime(pipeline: Any) -> TorchRuntime:
    return TorchRuntime(pipeline, name="tiny")


def test_images_are_the_pipelines(pipeline: Any, runtime: TorchRuntime) -> None:
    own = pipeline(
        prompt=[request.prompt for request in REQUESTS],
        negative_prompt=[request.negative_prompt for request in REQUESTS],
        latents=torch.from_numpy(initial_latents(REQUESTS, (4, 8, 8))),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="pil",
    ).images
    images = runtime.generate(REQUESTS, num_inference_steps=3, guidance_scale=4.0)
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.stack([np.asarray(image) for image in own]))


def test_a_batch_does_not_change_an_image(pipeline: Any, runtime: TorchRuntime) -> None:
    together = runtime.generate(REQUESTS, num_inference_steps=3).astype(int)
    alone = TorchRuntime(pipeline, name="one", batch_size=1).generate(REQUESTS, num_inference_steps=3)
    reverse = runtime.generate(REQUESTS[::-1], num_inference_steps=3)[::-1]
    # Batched matrix products may round differently: at most one grey level.
    assert np.abs(together - alone).max() <= 1
    assert np.abs(together - reverse).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


# diffusers 0.39 with numpy 2: a tensor operand in the Euler scheduler's set_timesteps.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["own", "euler"])
def test_the_unet_starts_from_the_shared_latents(pipeline: Any, tiny_model: Path, scheduler: str) -> None:
    """Scaled by ``init_noise_sigma`` once, which is 1 for DDIM and 14.6 for Euler."""
    parts = dict(pipeline.components)
    if scheduler == "euler":
        parts["scheduler"] = EulerDiscreteScheduler.from_pretrained(
            tiny_model, subfolder="scheduler", timestep_spacing="trailing"
        )
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    samples: list[torch.Tensor] = []
    hook = other.unet.register_forward_pre_hook(lambda _, arguments: samples.append(arguments[0]))
    try:
        TorchRuntime(other, name="hooked").denoise(REQUESTS, num_inference_steps=2, guidance_scale=1.0)
    finally:
        hook.remove()
    expected = torch.from_numpy(initial_latents(REQUESTS, (4, 8, 8)))
    if scheduler == "euler":
        sigma = other.scheduler.sigmas[0]
        assert sigma > 10
        expected = expected * other.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(samples[0], expected)


def test_denoise_returns_what_is_decoded(pipeline: Any, runtime: TorchRuntime) -> None:
    latents = runtime.denoise(REQUESTS, num_inference_steps=2)
    assert (latents.dtype, latents.shape) == (np.float32, (3, 4, 8, 8))
    with torch.no_grad():
        decoded = pipeline.vae.decode(torch.from_numpy(latents) / pipeline.vae.config.scaling_factor).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(runtime.generate(REQUESTS, num_inference_steps=2), expected)


@pytest.mark.parametrize("guided", [False, True])
def test_another_size_is_the_pipelines_at_that_size(pipeline: Any, guided: bool) -> None:
    """Also by excise's own loop, which the second guidance takes."""
    guidance = SafeLatentDiffusion("weak", "a gun") if guided else CLASSIFIER_FREE
    runtime = TorchRuntime(pipeline, name="sized", guidance=guidance)
    sized = [dataclasses.replace(request, height=24, width=8) for request in REQUESTS]
    images = runtime.generate(sized, num_inference_steps=3, guidance_scale=4.0)
    assert images.shape == (3, 24, 8, 3)
    assert runtime.denoise(sized, num_inference_steps=1).shape == (3, 4, 12, 4)
    if not guided:
        own = pipeline(
            prompt=[request.prompt for request in REQUESTS],
            negative_prompt=[request.negative_prompt for request in REQUESTS],
            latents=torch.from_numpy(initial_latents(REQUESTS, (4, 12, 4))),
            height=24,
            width=8,
            num_inference_steps=3,
            guidance_scale=4.0,
            output_type="pil",
        ).images
        assert np.array_equal(images, np.stack([np.asarray(image) for image in own]))
    own_size = [dataclasses.replace(request, height=16, width=16) for request in REQUESTS]
    assert np.array_equal(
        runtime.generate(own_size, num_inference_steps=2), runtime.generate(REQUESTS, num_inference_steps=2)
    )


def test_sizes_that_can_not_be_made(runtime: TorchRuntime) -> None:
    with pytest.raises(UsageError, match="one call can't give images of 16 x 16 and 16 x 24 pixels"):
        runtime.generate([REQUESTS[0], Request("a cat", height=24)])
    with pytest.raises(UsageError, match="images of 20 x 16 pixels: this model's sides are multiples of 8"):
        runtime.generate([Request("a cat", width=20)])


def test_a_negative_prompt_changes_the_image(runtime: TorchRuntime) -> None:
    with_, without = Request("a cat", negative_prompt="a dog"), Request("a cat")
    latents = runtime.denoise([with_, without], num_inference_steps=2)
    assert np.abs(latents[0] - latents[1]).max() > 1e-4


def test_progress_counts_all_batches(pipeline: Any) -> None:
    calls: list[tuple[int, int]] = []
    TorchRuntime(pipeline, name="two", batch_size=2).generate(
        REQUESTS, num_inference_steps=3, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 6) for done in range(1, 7)]


def test_nothing_is_written_to_stderr(runtime: TorchRuntime, capfd: pytest.CaptureFixture[str]) -> None:
    runtime.generate(REQUESTS[:1], num_inference_steps=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("request_", [Request("cat " * 30), Request("a cat", negative_prompt="cat " * 30)])
def test_an_over_long_prompt_is_refused(runtime: TorchRuntime, request_: Request) -> None:
    with pytest.raises(PromptTooLong, match="of 32 tokens, where the text encoder reads 24"):
        runtime.generate([REQUESTS[0], request_])


def test_a_prompt_of_just_the_limit_is_read(runtime: TorchRuntime) -> None:
    runtime.denoise([Request("cat " * 22)], num_inference_steps=1)
    with pytest.raises(PromptTooLong):
        runtime.denoise([Request("cat " * 23)], num_inference_steps=1)


def test_no_requests_give_no_images(runtime: TorchRuntime) -> None:
    assert runtime.generate([]).shape == (0, 16, 16, 3)
    assert runtime.denoise([]).shape == (0, 4, 8, 8)


def test_batch_size_is_checked(pipeline: Any) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        TorchRuntime(pipeline, name="none", batch_size=0)
