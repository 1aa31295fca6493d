"""Safe Latent Diffusion against diffusers' own pipeline, which took the published code over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import UsageError
from excise.eval.torch_runtime import TorchRuntime
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request, initial_latents
from excise.serve.safe_latent_diffusion import STRENGTHS, UNSAFE_CONCEPT, SafeLatentDiffusion, Strength

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of the published pipeline, which diffusers calls deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

REQUESTS = [Request("a red cat", seed=1), Request("an axe", negative_prompt="blue", seed=2)]
STEPS, SCALE, CONCEPT = 8, 5.0, "a gun"


@pytest.fixture(scope="module")
def published(tiny_model: Path) -> Any:
    from diffusers import StableDiffusionPipelineSafe

    pipeline = StableDiffusionPipelineSafe.from_pretrained(
        tiny_model, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.safety_concept == UNSAFE_CONCEPT
    pipeline.safety_concept = CONCEPT
    return pipeline


def by_publication(pipeline: Any, strength: Strength, shape: tuple[int, int, int]) -> list[np.ndarray[Any, Any]]:
    """The latents after each step."""
    import torch

    steps = []
    pipeline(
        prompt=[request.prompt for request in REQUESTS],
        negative_prompt=[request.negative_prompt for request in REQUESTS],
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=torch.from_numpy(initial_latents(REQUESTS, shape)),
        height=16,
        width=16,
        output_type="latent",
        callback=lambda step, timestep, latents: steps.append(latents.numpy().copy()),
        callback_steps=1,
        sld_guidance_scale=strength.guidance_scale,
        sld_warmup_steps=strength.warmup_steps,
        sld_threshold=strength.threshold,
        sld_momentum_scale=strength.momentum_scale,
        sld_mom_beta=strength.momentum_beta,
    )
    return steps


#: The published strengths, with a warm-up that ends within so few steps.
FIGURES = {name: Strength(min(s.warmup_steps, 3), *list(vars(s).values())[1:]) for name, s in STRENGTHS.items()}


@pytest.mark.parametrize("name", FIGURES)
def test_equals_the_published_pipeline_step_by_step(name: str, published: Any, runtime: OnnxRuntime) -> None:
    expected = by_publication(published, FIGURES[name], runtime.latent_shape)
    found: list[np.ndarray[Any, Any]] = []
    safe = OnnxRuntime(runtime.folder, threads=1, guidance=SafeLatentDiffusion(FIGURES[name], CONCEPT))
    safe.denoise(REQUESTS, num_inference_steps=STEPS, guidance_scale=SCALE, on_step=lambda one: found.append(one))
    assert len(found) == len(expected) == STEPS
    plain = runtime.denoise(REQUESTS, num_inference_steps=STEPS, guidance_scale=SCALE)
    moved = np.abs(expected[-1] - plain).max()
    assert moved > 0.01, "the guidance has to do something for this test to show anything"
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() <= 2e-3 * moved


def test_of_pytorch_equals_onnx(tiny_model: Path, runtime: OnnxRuntime) -> None:
    from diffusers import StableDiffusionPipeline

    guidance = SafeLatentDiffusion(FIGURES["strong"], CONCEPT)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    torch = TorchRuntime(pipeline, name="torch", guidance=guidance, batch_size=1)
    onnx = OnnxRuntime(runtime.folder, threads=1, guidance=guidance)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": SCALE}
    calls: list[tuple[int, int]] = []
    latents = torch.denoise(REQUESTS, progress=lambda done, total: calls.append((done, total)), **settings)
    np.testing.assert_allclose(latents, onnx.denoise(REQUESTS, **settings), atol=1e-3)
    assert calls == [(step + 1, 2 * STEPS) for step in range(2 * STEPS)]


def test_leaving_images_change_nothing_for_the_others(runtime: OnnxRuntime) -> None:
    guidance = SafeLatentDiffusion(FIGURES["strong"], CONCEPT)
    safe = OnnxRuntime(runtime.folder, threads=1, guidance=guidance)
    together = safe.start([*REQUESTS, REQUESTS[0]], num_inference_steps=STEPS, guidance_scale=SCALE)
    for _ in range(4):
        together.step()
    together.keep([1])
    alone = safe.denoise(REQUESTS[1:], num_inference_steps=STEPS, guidance_scale=SCALE)
    assert together.rows.tolist() == [1]
    np.testing.assert_allclose(together.run(), alone, atol=1e-4)


def test_published_strengths() -> None:
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    for name, strength in STRENGTHS.items():
        assert tuple(vars(strength).values()) == tuple(getattr(SafetyConfig, name.upper()).values())
    assert SafeLatentDiffusion().texts == (UNSAFE_CONCEPT,)


@pytest.mark.parametrize(
    ("strength", "concept", "message"),
    [
        ("extreme", CONCEPT, "extreme.*weak, medium, strong, max"),
        ("max", " ", "name it"),
        (Strength(0, float("nan"), 0, 0, 0), CONCEPT, "finite"),
        (Strength(-1, 1, 0, 0, 0), CONCEPT, "from 0"),
    ],
)
def test_bad_input(strength: Any, concept: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SafeLatentDiffusion(strength, concept)


def test_needs_guidance(runtime: OnnxRuntime) -> None:
    safe = OnnxRuntime(runtime.folder, threads=1, guidance=SafeLatentDiffusion("max", CONCEPT))
    with pytest.raises(UsageError, match=r"guidance_scale=1: .* more than 1"):
        safe.generate(REQUESTS, num_inference_steps=2, guidance_scale=1.0)
