"""The model under attack is the pipeline itself: its embeddings, its hidden states, its latents, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DDIMScheduler

from excise.errors import ModelError, PromptTooLong, UsageError
from excise.eval.attack import Candidate
from excise.eval.attacked_model import AttackedModel, open_attacked
from excise.eval.case_image import CaseImage, ImageSimilarity
from excise.eval.cases import Case
from excise.eval.clip_encoder import ClipEncoder
from excise.eval.torch_runtime import TorchRuntime
from excise.eval.verification_sides import parse_side
from excise.export.pipeline import load_pipeline
from excise.serve.runtime import Request

PROMPTS = ["a gun", "", "a noto cat on a red background"]


@pytest.fixture(scope="module")
def pipeline(demo_model: Path) -> Any:
    return load_pipeline(demo_model)


@pytest.fixture(scope="module")
def model(pipeline: Any) -> AttackedModel:
    return AttackedModel(pipeline)


@pytest.fixture(scope="module")
def image() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


# Text.


@pytest.mark.parametrize("prompt", PROMPTS)
def test_hidden_states_are_the_pipelines(pipeline: Any, model: AttackedModel, prompt: str) -> None:
    with torch.no_grad():
        own = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
    states = model.encode(model.framed(model.embed(model.tokenize(prompt))))
    assert states.shape == (1, 24, 256)
    assert torch.equal(states, own)
    assert torch.equal(model.encode_prompt(prompt), own)


def test_the_model_reads_ids_again_after_encode(pipeline: Any, model: AttackedModel) -> None:
    """Nothing is left behind in the pipeline, even after an error."""
    with torch.no_grad():
        before = pipeline.encode_prompt("a cat", "cpu", 1, False)[0]
        model.encode(torch.zeros(1, 24, 256))
        with pytest.raises((RuntimeError, ValueError)):
            model.encode(torch.zeros(1, 24, 255))
        assert torch.equal(pipeline.encode_prompt("a cat", "cpu", 1, False)[0], before)


def test_gradients_reach_the_embeddings_and_nothing_else(pipeline: Any, model: AttackedModel) -> None:
    """The gradient of a smooth function of the hidden states is its slope, by central differences."""
    generator = torch.Generator().manual_seed(0)
    tokens = model.framed(model.embed(model.tokenize("a gun"))).requires_grad_()
    weights = torch.randn(tokens.shape, generator=generator)

    def value(step: float, direction: torch.Tensor) -> torch.Tensor:
        return (model.encode(tokens + step * direction).double() * weights).sum()

    (gradient,) = torch.autograd.grad(value(0, torch.zeros_like(tokens)), [tokens])
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(1e-4, direction) - value(-1e-4, direction)).item() / 2e-4
    assert gradient.norm().item() == pytest.approx(slope, rel=1e-2)
    parts = (pipeline.text_encoder, pipeline.unet, pipeline.vae)
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())


def test_padding_can_be_another_token(model: AttackedModel) -> None:
    framed = model.framed(model.embed([5, 6]), padding=0)[0]
    ids = [709, 5, 6, 710] + [0] * 20
    assert torch.equal(framed, model.embed(ids))
    assert torch.equal(model.framed(model.embed([5, 6]))[0], model.embed([709, 5, 6] + [710] * 21))


def test_text_that_is_read_otherwise_is_known(model: AttackedModel) -> None:
    gun = model.candidate(model.tokenize("a gun"))
    assert gun == Candidate(prompt="a gun", token_ids=model.tokenize("a gun"))
    assert model.survives(gun)
    piece = model.candidate([*model.tokenize("gun"), 6])  # an apostrophe inside a word, alone at the end
    assert not model.survives(piece)
    assert not model.survives(model.candidate([*model.tokenize("gun"), 710])), "the end token is left out"
    assert model.candidate([*model.tokenize("gun"), 710]).prompt.strip() == "gun"


def test_long_text_does_not_fit(model: AttackedModel) -> None:
    assert model.room == 22
    assert model.fits(Candidate(prompt="gun " * 22))
    assert not model.fits(Candidate(prompt="gun " * 23))
    with pytest.raises(PromptTooLong, match="23 tokens, where the text encoder reads 22"):
        model.encode_prompt("gun " * 23)
    with pytest.raises(PromptTooLong, match="23 learnable tokens, where the text encoder has room for 22"):
        model.check_room(23)
    with pytest.raises(PromptTooLong, match=r"20 learnable tokens beside the prompt's 3, .* room for 22"):
        model.check_room(20, [1, 2, 3])
    model.check_room(19, [1, 2, 3])


def test_words_are_the_tokens_that_are_read_as_themselves(model: AttackedModel) -> None:
    words, everything = model.vocabulary("words"), model.vocabulary("all")
    assert everything.ids.tolist() == list(range(711))
    assert torch.equal(everything.embeddings, model.token_embeddings)
    alone = [one for one in range(709) if model.survives(model.candidate([one]))]
    assert words.ids.tolist() == alone
    assert torch.equal(words.embeddings, model.embed(alone))
    assert set(model.tokenize("a gun in the style of noto")) <= set(alone)
    rng = np.random.default_rng(0)
    drawn = [model.candidate(rng.choice(words.ids.numpy(), 8).tolist()) for _ in range(50)]
    assert all(model.survives(one) for one in drawn)
    loose = [model.candidate(rng.integers(0, 711, 8).tolist()) for _ in range(50)]
    assert not all(model.survives(one) for one in loose)


# Images and noise.


def test_latents_are_the_vaes(pipeline: Any, model: AttackedModel, image: npt.NDArray[np.uint8]) -> None:
    pixels = pipeline.image_processor.preprocess(image[None].astype(np.float32) / 255)
    with torch.no_grad():
        distribution = pipeline.vae.encode(pixels).latent_dist
    factor = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(model.latents(image), distribution.mean * factor, rtol=0, atol=1e-5)
    drawn = [model.latents(image, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    unit = model.latents(image, unit_range=True)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels / 2 + 0.5).latent_dist.mean * factor
    torch.testing.assert_close(unit, expected, rtol=0, atol=1e-5)


def test_an_image_comes_back_from_its_latents(pipeline: Any, model: AttackedModel) -> None:
    """The scale is right: a wrong one would decode to another picture."""
    runtime = TorchRuntime(pipeline, name="demo")
    drawn = runtime.generate([Request("a cat", seed=3)], num_inference_steps=4)[0]
    back = runtime.decode_samples(model.latents(drawn).numpy())[0].transpose(1, 2, 0)
    error = np.abs((back + 1) * 127.5 - drawn).mean()
    wrong = runtime.decode_samples(model.latents(drawn, unit_range=True).numpy())[0].transpose(1, 2, 0)
    assert error < 8 < np.abs((wrong + 1) * 127.5 - drawn).mean()


@pytest.mark.parametrize("timestep", [0, 10, 990])
def test_noise_and_targets_are_the_schedulers(pipeline: Any, model: AttackedModel, timestep: int) -> None:
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    at = torch.tensor([timestep])
    own = pipeline.scheduler.add_noise(latents, noise, at)
    torch.testing.assert_close(model.noised(latents, noise, timestep), own, rtol=1e-5, atol=1e-6)
    assert model.prediction_type == "v_prediction"
    velocity = pipeline.scheduler.get_velocity(latents, noise, at)
    torch.testing.assert_close(model.training_target(latents, noise, timestep), velocity, rtol=1e-5, atol=1e-6)


def test_the_target_of_a_noise_model_is_the_noise(tiny_model: Path) -> None:
    model = AttackedModel(load_pipeline(tiny_model))
    assert model.prediction_type == "epsilon"
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert model.training_target(latents, noise, 500) is noise


def test_the_prediction_is_the_unets(pipeline: Any, model: AttackedModel) -> None:
    noisy = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    states = model.encode_prompt("a gun")
    own = TorchRuntime(pipeline, name="demo").predict(noisy.numpy(), 490, states.numpy())
    assert np.array_equal(model.predict(noisy, 490, states).numpy(), own)


# What can't be attacked.


def test_an_export_has_no_gradients(tmp_path: Path) -> None:
    def never(folder: Path, edit: object) -> Any:
        raise AssertionError("an export isn't loaded")

    with pytest.raises(UsageError, match=r"attack the PyTorch model .* then replay the prompts"):
        open_attacked(parse_side(f"onnx:{tmp_path}"), never)
    with pytest.raises(UsageError, match="no PyTorch text_encoder, so no gradients"):
        AttackedModel(SimpleNamespace(text_encoder=object(), unet=object(), vae=object()))


def test_a_folder_is_opened(demo_model: Path) -> None:
    assert open_attacked(parse_side(f"torch:{demo_model}"), load_pipeline).context == 24


def two_text_encoders(parts: dict[str, Any]) -> None:
    parts["text_encoder_2"] = parts["text_encoder"]


def other_encoder(parts: dict[str, Any]) -> None:
    parts["text_encoder"] = torch.nn.Linear(1, 1)


def masked(parts: dict[str, Any]) -> None:
    parts["text_encoder"] = deepcopy(parts["text_encoder"])
    parts["text_encoder"].config.use_attention_mask = True


def predicts_images(parts: dict[str, Any]) -> None:
    parts["scheduler"] = DDIMScheduler(prediction_type="sample")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (two_text_encoders, "one CLIP text encoder"),
        (other_encoder, "one CLIP text encoder"),
        (masked, "masks its prompts' padding"),
        (predicts_images, "predicts 'sample'"),
    ],
)
def test_another_kind_of_model_is_refused(pipeline: Any, spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    parts = dict(pipeline.components)
    spoil(parts)
    with pytest.raises(ModelError, match=message):
        AttackedModel(SimpleNamespace(**parts))


# The images that attacks compare.


def test_a_cases_image_has_its_seed_and_guidance(pipeline: Any) -> None:
    runtime = TorchRuntime(pipeline, name="demo")
    case = Case("one", "a cat", 7, 3.0, negative_prompt="a dog")
    draw = CaseImage(runtime, num_inference_steps=2)
    request = [Request("a cat", negative_prompt="a dog", seed=7)]
    own = runtime.generate(request, num_inference_steps=2, guidance_scale=3.0)[0]
    assert np.array_equal(draw(case), own)
    assert not np.array_equal(draw(case, "a gun"), own)
    assert np.array_equal(draw(case, "a cat"), own)
    with pytest.raises(UsageError, match="at least 1, not 0"):
        CaseImage(runtime, num_inference_steps=0)


def test_similarity_is_clips_cosine(demo_clip: Path, image: npt.NDArray[np.uint8]) -> None:
    encoder = ClipEncoder(demo_clip)
    grey = np.full_like(image, 128)
    features = encoder.image_features([grey, image]).astype(float)
    near = ImageSimilarity(encoder)([image, grey], image)
    np.testing.assert_allclose(near, [1, features[0] @ features[1]], atol=1e-6)
    assert near[1] < 0.99
