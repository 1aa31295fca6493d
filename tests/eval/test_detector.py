"""The zero-shot detector on the bundled CLIP: shapes, invariances, preprocessing and errors; nothing about accuracy."""

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
from excise.eval.detector import ClipDetector

LABELS = {"cat": ["a cat", "cat"], "gun": ["a gun"], "owl": ["an owl", "owl"]}


@pytest.fixture(scope="module")
def detector(demo_clip: Path) -> ClipDetector:
    return ClipDetector(demo_clip, LABELS)


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


def test_shapes(detector: ClipDetector, images: npt.NDArray[np.uint8]) -> None:
    logits = detector.logits(images)
    assert (logits.shape, logits.dtype) == ((5, 3), np.float32)
    assert np.array_equal(detector.detect(images), logits.argmax(1))
    assert detector.image_features(images).shape == (5, detector.dimension)
    assert detector.text_features(["a cat", "an owl on red"]).shape == (2, detector.dimension)
    assert detector.logits(images[:0]).shape == (0, 3)


def test_features_are_unit_rows(detector: ClipDetector, images: npt.NDArray[np.uint8]) -> None:
    for rows in (detector.image_features(images), detector.text_features(["a cat", "a gun"])):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


def test_the_same_image_gets_the_same_logits(
    detector: ClipDetector, demo_clip: Path, images: npt.NDArray[np.uint8]
) -> None:
    assert np.array_equal(detector.logits(images), detector.logits(images))
    alone = ClipDetector(demo_clip, LABELS, batch_size=1).logits(images)
    np.testing.assert_allclose(detector.logits(images), alone, atol=1e-3)


def test_logits_are_transformers_own(demo_clip: Path, images: npt.NDArray[np.uint8]) -> None:
    model = CLIPModel.from_pretrained(demo_clip, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(demo_clip)(["cat", "gun"], padding=True, return_tensors="pt")
    pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(**tokens, pixel_values=pixels).logits_per_image.numpy()
    logits = ClipDetector(demo_clip, {"cat": ["cat"], "gun": ["gun"]}).logits(images)
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_a_label_is_the_mean_of_its_prompts(detector: ClipDetector, images: npt.NDArray[np.uint8]) -> None:
    mean = detector.text_features(LABELS["owl"]).mean(0)
    cosines = detector.image_features(images) @ (mean / np.linalg.norm(mean))
    scale = np.exp(detector.encoder._model.logit_scale.item())
    np.testing.assert_allclose(detector.logits(images)[:, 2], scale * cosines, atol=1e-3)


def test_preprocessing_maps_to_minus_one_and_one(detector: ClipDetector) -> None:
    black_and_white = np.zeros((2, 64, 64, 3), np.uint8)
    black_and_white[1] = 255
    pixels = detector.encoder.preprocess(black_and_white)
    assert (pixels.dtype, pixels.shape) == (np.float32, (2, 3, 64, 64))
    assert (pixels[0] == -1).all()
    assert (pixels[1] == 1).all()


def test_other_sizes_are_resized(detector: ClipDetector) -> None:
    image = np.random.default_rng(1).integers(0, 256, (1, 96, 128, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image[0]).resize((64, 64), Image.Resampling.BICUBIC)) / 127.5 - 1
    np.testing.assert_allclose(detector.encoder.preprocess(image)[0].transpose(1, 2, 0), expected, atol=1e-6)


def test_a_preprocessor_config_is_followed(tmp_path: Path, demo_clip: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(demo_clip, folder)
    mean, std = [0.48, 0.45, 0.4], [0.26, 0.25, 0.27]
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "image_mean": mean,
                "image_std": std,
                "size": {"shortest_edge": 64},
                "crop_size": {"height": 64, "width": 64},
                "resample": 3,
            }
        )
    )
    image = np.random.default_rng(2).integers(0, 256, (1, 128, 192, 3), np.uint8)
    resized = np.asarray(Image.fromarray(image[0]).resize((96, 64), Image.Resampling.BICUBIC))[:, 16:80]
    pixels = ClipDetector(folder, LABELS).encoder.preprocess(image)
    assert (pixels.dtype, pixels.shape) == (np.float32, (1, 3, 64, 64))
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), (resized / 255 - mean) / std, atol=1e-5)


def test_images_must_be_uint8_rgb(detector: ClipDetector) -> None:
    with pytest.raises(UsageError, match="float64 with shape"):
        detector.logits(np.zeros((1, 64, 64, 3)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="uint8 with shape"):
        detector.logits(np.zeros((64, 64, 3), np.uint8))


def test_an_over_long_prompt_is_refused(detector: ClipDetector) -> None:
    with pytest.raises(PromptTooLong, match="not 102"):
        detector.text_features(["a cat", "cat " * 100])


@pytest.mark.parametrize("labels", [{}, {"cat": []}, {"cat": "a cat"}])
def test_labels_need_prompts(demo_clip: Path, labels: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError, match="at least one"):
        ClipDetector(demo_clip, labels)


def test_a_folder_without_a_clip_is_refused(tmp_path: Path, demo_clip: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ClipDetector(tmp_path, LABELS)
    shutil.copy(demo_clip / "config.json", tmp_path)
    with pytest.raises(ModelError, match="not a CLIP that transformers can load"):
        ClipDetector(tmp_path, LABELS)
