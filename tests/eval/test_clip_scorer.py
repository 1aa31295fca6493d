"""CLIP scores are transformers' own logits, image by image, and say whose prompt was cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from excise.errors import PromptTooLong, UsageError
from excise.eval.clip_encoder import ClipEncoder
from excise.eval.clip_scorer import ClipScorer

PROMPTS = ["a cat", "an owl on red", "a gun", "a cat", "knife"]
LONG = "a cat " * 30


@pytest.fixture(scope="module")
def encoder(demo_clip: Path) -> ClipEncoder:
    return ClipEncoder(demo_clip, batch_size=4)


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


def test_scores_are_transformers_logits(encoder: ClipEncoder, demo_clip: Path, images: npt.NDArray[np.uint8]) -> None:
    model = CLIPModel.from_pretrained(demo_clip, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(demo_clip)(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = np.diagonal(model(**tokens, pixel_values=pixels).logits_per_image.numpy())
    expected = 100 * logits / model.logit_scale.exp().item()
    scores = ClipScorer(encoder).scores(images, PROMPTS)
    assert (scores.values.shape, scores.values.dtype) == ((5,), np.float64)
    # Both signs are there, so that the clipping at zero is tried too. Measured: 8e-6 of a hundred.
    assert expected.min() < -1
    assert expected.max() > 1
    np.testing.assert_allclose(scores.values, np.maximum(expected, 0), atol=5e-5)
    assert scores.mean() == pytest.approx(np.maximum(expected, 0).mean(), abs=5e-5)
    assert scores.truncated_count == 0


def test_shared_features_give_the_same_scores(encoder: ClipEncoder, images: npt.NDArray[np.uint8]) -> None:
    scorer = ClipScorer(encoder)
    whole = scorer.scores(images, PROMPTS).values
    assert np.array_equal(scorer.scores_of(encoder.image_features(images), PROMPTS).values, whole)
    alone = [scorer.scores(images[i : i + 1], [PROMPTS[i]]).values[0] for i in range(5)]
    assert np.array_equal(alone, whole)


def test_long_prompts_are_refused_or_cut_and_counted(encoder: ClipEncoder, images: npt.NDArray[np.uint8]) -> None:
    prompts = ["a cat", LONG, "a gun", LONG + "on red", "knife"]
    with pytest.raises(PromptTooLong, match="reads 24 tokens, not 62"):
        ClipScorer(encoder).scores(images, prompts)
    scorer = ClipScorer(encoder, truncate=True)
    scores = scorer.scores(images, prompts)
    assert scores.truncated.tolist() == [False, True, False, True, False]
    assert scores.truncated_count == 2
    short = [0, 2, 4]
    untouched = ClipScorer(encoder).scores(images[short], [prompts[i] for i in short])
    assert np.array_equal(scores.values[short], untouched.values)
    # A prompt of exactly the limit is read whole: start, 22 words, end.
    assert encoder.token_count("cat " * 22) == encoder.prompt_limit
    assert scorer.scores(images[:1], ["cat " * 22]).truncated_count == 0


def test_names_and_fingerprints_say_what_was_scored(encoder: ClipEncoder) -> None:
    plain, cut = ClipScorer(encoder), ClipScorer(encoder, truncate=True)
    assert plain.name == "CLIP score (clip)"
    assert plain.fingerprint.weights == encoder.fingerprint.weights
    assert cut.fingerprint.preprocessing.endswith("; prompts cut at 24 tokens")
    assert plain.fingerprint != cut.fingerprint


def test_scores_need_one_prompt_an_image(encoder: ClipEncoder, images: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(UsageError, match="one prompt an image, not 1 for 5"):
        ClipScorer(encoder).scores(images, ["a cat"])
    with pytest.raises(UsageError, match="needs pairs"):
        ClipScorer(encoder).scores_of(encoder.image_features(images), ["a cat"])
    nothing = ClipScorer(encoder).scores(images[:0], [])
    assert nothing.values.shape == (0,)
    with pytest.raises(UsageError, match="at least one image"):
        nothing.mean()
