"""Stable Diffusion's output filter, with a tiny random CLIP whose one hidden concept is an image of the test's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import ModelError, UsageError
from excise.eval.runtime_spec import parse_runtime
from excise.eval.runtimes import check_runtime, open_runtime
from excise.eval.safety_checker import CHECKER, PROCESSOR, SafetyChecker
from excise.serve.runtime import Request

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

RANDOM = np.random.default_rng(3)
UNSAFE, SAFE = (RANDOM.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(2))


@pytest.fixture(scope="module")
def checked_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a checker that knows ``UNSAFE``, and nothing else."""
    import shutil

    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from PIL import Image
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    config = CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 16, "patch_size": 4}, projection_dim=16
    )
    checker = StableDiffusionSafetyChecker(config).eval()
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    pixels = processor([Image.fromarray(UNSAFE)], return_tensors="pt").pixel_values
    with torch.no_grad():
        hidden = checker.visual_projection(checker.vision_model(pixels)[1])[0]
        checker.concept_embeds.copy_(-hidden.expand(17, -1))
        checker.concept_embeds[0] = hidden
        checker.concept_embeds_weights.fill_(0.999)
        checker.special_care_embeds.copy_(-hidden.expand(3, -1))
        checker.special_care_embeds_weights.fill_(0.999)
    folder = tmp_path_factory.mktemp("checked") / "model"
    shutil.copytree(tiny_model, folder)
    checker.save_pretrained(folder / CHECKER)
    processor.save_pretrained(folder / PROCESSOR)
    return folder


def test_flags_the_hidden_concept_alone(checked_model: Path) -> None:
    checker = SafetyChecker(checked_model)
    verdicts = checker.verdicts([SAFE, UNSAFE, SAFE])
    assert [verdict.flagged for verdict in verdicts] == [False, True, False]
    assert checker.verdicts([]) == []


def test_a_runtime_behind_it(checked_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from excise.export.pipeline import load_pipeline

    plain = open_runtime(parse_runtime(f"plain=torch:{checked_model}"), load_pipeline)
    filtered = open_runtime(
        parse_runtime(f"safe=torch:{checked_model}?filter=safety-checker:{checked_model}"), load_pipeline
    )
    requests = [Request("a cat", seed=1), Request("a gun", seed=2)]
    expected = plain.generate(requests, num_inference_steps=2)
    np.testing.assert_array_equal(filtered.generate(requests, num_inference_steps=2), expected)
    assert filtered.name == "safe"
    monkeypatch.setattr(filtered._runtime, "generate", lambda *_, **__: np.stack([UNSAFE, SAFE]))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(filtered.generate(requests), np.stack([np.zeros_like(UNSAFE), SAFE]))


def test_what_is_missing_is_told_first(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"has no safety_checker/config.json"):
        check_runtime(parse_runtime(f"safe=torch:{tiny_model}?filter=safety-checker:{tiny_model}"))
    with pytest.raises(UsageError, match="filter='nsfw' isn't nudenet or safety-checker:DIR"):
        parse_runtime(f"safe=torch:{tiny_model}?filter=nsfw")
