"""The bundled CLIP as an encoder: transformers' own features, whatever the company; long prompts; fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from excise.errors import ModelError, PromptTooLong, UsageError
from excise.eval.clip_encoder import ClipEncoder

PROMPTS = ["a cat", "an owl on red", "cat"]


@pytest.fixture(scope="module")
def encoder(demo_clip: Path) -> ClipEncoder:
    return ClipEncoder(demo_clip, batch_size=4)


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def with_preprocessor(tmp_path_factory: pytest.TempPathFactory, demo_clip: Path) -> Path:
    """The same CLIP with a preprocessor like OpenAI's: shortest edge, centre crop, its own mean and deviation."""
    folder = tmp_path_factory.mktemp("clips") / "clip"
    shutil.copytree(demo_clip, folder)
    document = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.48, 0.45, 0.4],
        "image_std": [0.26, 0.25, 0.27],
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64},
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(document))
    return folder


def test_features_are_transformers_own(encoder: ClipEncoder, demo_clip: Path, images: npt.NDArray[np.uint8]) -> None:
    model = CLIPModel.from_pretrained(demo_clip, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(demo_clip)(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(**tokens, pixel_values=pixels)
    # Measured: 2e-7 for images and for texts, which transformers pads here and the encoder doesn't.
    np.testing.assert_allclose(encoder.image_features(images), expected.image_embeds.numpy(), atol=1e-6)
    np.testing.assert_allclose(encoder.text_features(PROMPTS), expected.text_embeds.numpy(), atol=1e-6)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert encoder.image_features(images[:0]).shape == (0, encoder.dimension) == (0, 128)
    assert encoder.text_features([]).shape == (0, 128)


def test_features_do_not_depend_on_their_company(
    encoder: ClipEncoder, demo_clip: Path, images: npt.NDArray[np.uint8]
) -> None:
    whole = encoder.image_features(images)
    order = np.random.default_rng(1).permutation(len(images))
    # Measured: not one bit with batches of one shape; batches of another shape differ by up to 2e-7.
    assert np.array_equal(encoder.image_features(images[order]), whole[order])
    assert np.array_equal(np.concatenate([encoder.image_features([image]) for image in images]), whole)
    np.testing.assert_allclose(ClipEncoder(demo_clip, batch_size=1).image_features(images), whole, atol=2e-6)
    texts = encoder.text_features(PROMPTS)
    fresh = ClipEncoder(demo_clip)
    assert np.array_equal(np.concatenate([fresh.text_features([prompt]) for prompt in PROMPTS[::-1]])[::-1], texts)


def test_images_of_any_size_are_read(encoder: ClipEncoder, with_preprocessor: Path) -> None:
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, shape, np.uint8) for shape in ((64, 64, 3), (96, 128, 3), (128, 192, 3))]
    resized = np.asarray(Image.fromarray(images[1]).resize((64, 64), Image.Resampling.BICUBIC)) / 127.5 - 1
    np.testing.assert_allclose(encoder.preprocess(images)[1].transpose(1, 2, 0), resized, atol=1e-6)
    cropped = np.asarray(Image.fromarray(images[2]).resize((96, 64), Image.Resampling.BICUBIC))[:, 16:80]
    expected = (cropped / 255 - [0.48, 0.45, 0.4]) / [0.26, 0.25, 0.27]
    theirs = ClipEncoder(with_preprocessor).preprocess(images)
    np.testing.assert_allclose(theirs[2].transpose(1, 2, 0), expected, atol=1e-5)
    with pytest.raises(UsageError, match="uint8 with shape"):
        encoder.image_features(images[0])


def test_a_long_prompt_is_refused_or_cut_where_transformers_cuts(encoder: ClipEncoder, demo_clip: Path) -> None:
    long = "a cat " * 30
    assert encoder.token_count(long) == 62
    assert encoder.token_count("a cat") == 4
    assert encoder.prompt_limit == 24
    with pytest.raises(PromptTooLong, match="reads 24 tokens, not 62: shorten 'a cat"):
        encoder.text_features(["a cat", long])
    cut = encoder.text_features([long], truncate=True)
    model = CLIPModel.from_pretrained(demo_clip, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(demo_clip)([long], truncation=True, max_length=24, return_tensors="pt")
    assert tokens["input_ids"][0, -1] == model.config.text_config.eos_token_id
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_text_features(**tokens), dim=-1)
    np.testing.assert_allclose(cut, expected.numpy(), atol=1e-6)
    # The same beginning is the same text; another one is not. A cut prompt is still refused without the option.
    assert np.array_equal(encoder.text_features([long + "a gun"], truncate=True), cut)
    assert not np.allclose(encoder.text_features(["a gun " + long], truncate=True), cut, atol=1e-3)
    with pytest.raises(PromptTooLong):
        encoder.text_features([long])


def test_fingerprints_tell_weights_and_preprocessing_apart(
    encoder: ClipEncoder, with_preprocessor: Path, demo_clip: Path, tmp_path: Path
) -> None:
    assert ClipEncoder(demo_clip).fingerprint == encoder.fingerprint
    assert ClipEncoder(demo_clip, name="small").fingerprint.name == "small"
    processed = ClipEncoder(with_preprocessor).fingerprint
    assert processed.weights == encoder.fingerprint.weights
    assert processed.preprocessing != encoder.fingerprint.preprocessing
    model = CLIPModel.from_pretrained(demo_clip, dtype=torch.float32)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 0.01
    shutil.copytree(demo_clip, tmp_path / "clip")
    model.save_pretrained(tmp_path / "clip")
    assert ClipEncoder(tmp_path / "clip").fingerprint.difference(encoder.fingerprint).startswith("weights ")  # type: ignore[union-attr]


def test_a_folder_without_a_clip_is_refused(tmp_path: Path, demo_clip: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ClipEncoder(tmp_path)
    shutil.copy(demo_clip / "config.json", tmp_path)
    with pytest.raises(ModelError, match="not a CLIP that transformers can load"):
        ClipEncoder(tmp_path)
