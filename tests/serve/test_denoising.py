"""What leaves the denoising loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from excise.errors import ArtefactError, UsageError
from excise.serve.denoising import Denoising, to_uint8
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request, initial_latents
from excise.serve.schedulers import read_scheduler_config, scheduler_from_config
from excise.serve.text_requests import RequestTexts

REQUESTS = [Request("a red cat", seed=1), Request("an axe", seed=2), Request("two blue houses", seed=3)]

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers' Euler scheduler calls np.array(torch.Tensor)
)


def test_rounding_of_images() -> None:
    from diffusers.image_processor import VaeImageProcessor
    from torch import from_numpy

    values = np.linspace(-1.2, 1.2, 3 * 64 * 64, dtype=np.float32).reshape(1, 3, 64, 64)
    expected = VaeImageProcessor().postprocess(from_numpy(values), output_type="pil")[0]
    np.testing.assert_array_equal(to_uint8(values)[0], np.asarray(expected))


def test_broken_values_are_not_a_picture() -> None:
    with pytest.raises(ArtefactError, match="fp32"):
        to_uint8(np.full((1, 3, 2, 2), np.nan, np.float32))


SETTINGS: dict[str, Any] = {"num_inference_steps": 6}


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_images_that_leave_change_nothing_for_the_others(runtime: OnnxRuntime, scheduler: str) -> None:
    config = read_scheduler_config(runtime.folder / "scheduler" / "scheduler_config.json")
    options = {"_class_name": scheduler, "skip_prk_steps": True, "prediction_type": config["prediction_type"]}
    noise = initial_latents(REQUESTS, runtime.latent_shape)
    prompts = runtime.condition([request.prompt for request in REQUESTS])
    negative = runtime.condition([""] * len(REQUESTS))

    def start(rows: list[int]) -> Denoising:
        return Denoising(
            runtime.predict,
            scheduler_from_config(options),
            noise[rows],
            RequestTexts(negative[rows], prompts[rows]),
            guidance_scale=[(2.0, 5.0, 1.0)[row] for row in rows],
            **SETTINGS,
        )

    together = start([0, 1, 2])
    together.step()
    together.step()
    together.keep([0, 2])
    together.step()
    together.keep([1])
    assert together.rows.tolist() == [2]
    final = together.run()
    assert final.shape[0] == 1
    np.testing.assert_allclose(final, start([2]).run(), atol=1e-4)
    assert np.abs(final - start([1]).run()).max() > 0.01, "another image is another image"


def test_each_image_has_its_own_guidance_scale(runtime: OnnxRuntime) -> None:
    scales = [7.5, 1.0, 3.0]
    together = runtime.denoise(REQUESTS, guidance_scale=scales, **SETTINGS)
    for request, scale, latents in zip(REQUESTS, scales, together, strict=True):
        alone = runtime.denoise([request], guidance_scale=scale, **SETTINGS)[0]
        np.testing.assert_allclose(latents, alone, atol=1e-4)
    chunked = OnnxRuntime(runtime.folder, threads=1, batch_size=2).denoise(REQUESTS, guidance_scale=scales, **SETTINGS)
    np.testing.assert_allclose(chunked, together, atol=1e-4)
    other = runtime.denoise(REQUESTS, guidance_scale=scales[::-1], **SETTINGS)
    assert np.abs(other[0] - together[0]).max() > 0.01


def test_embeddings_take_the_place_of_prompts(runtime: OnnxRuntime) -> None:
    embeds = runtime.encode([request.prompt for request in REQUESTS])
    blank = [Request("", seed=request.seed) for request in REQUESTS]
    found = runtime.denoise(blank, prompt_embeds=embeds, **SETTINGS)
    np.testing.assert_array_equal(found, runtime.denoise(REQUESTS, **SETTINGS))
    with pytest.raises(UsageError, match=r"prompt_embeds has shape \(2, 24, 32\): give \(3, 24, 32\)"):
        runtime.denoise(REQUESTS, prompt_embeds=embeds[:2], **SETTINGS)
    with pytest.raises(UsageError, match=r"prompt_embeds has shape \(3, 2, 32\)"):
        runtime.denoise(REQUESTS, prompt_embeds=embeds[:, :2], **SETTINGS)


def test_as_many_scales_as_requests(runtime: OnnxRuntime) -> None:
    with pytest.raises(UsageError, match="2 guidance scales for 3 requests"):
        runtime.denoise(REQUESTS, guidance_scale=[1.0, 2.0], **SETTINGS)
    with pytest.raises(UsageError, match="guidance_scale=nan"):
        runtime.denoise(REQUESTS, guidance_scale=[1.0, 2.0, float("nan")], **SETTINGS)
