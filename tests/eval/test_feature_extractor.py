"""Batches of one shape, names of distances and fingerprints."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from excise.errors import UsageError
from excise.eval.feature_extractor import Fingerprint, check_images, distance_name, full_batches

FINGERPRINT = Fingerprint(name="clip", weights="0" * 64, preprocessing="none")


@pytest.mark.parametrize("as_list", [False, True])
def test_the_last_batch_is_filled_up_with_its_last_image(as_list: bool) -> None:
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, 3), np.uint8)
    batches = list(full_batches(list(images) if as_list else images, 3))
    assert [([int(image[0, 0, 0]) for image in batch], counted) for batch, counted in batches] == [
        ([0, 1, 2], 3),
        ([3, 4, 5], 3),
        ([6, 6, 6], 1),
    ]
    assert list(full_batches(images[:0], 3)) == []


def test_images_of_several_sizes_share_a_batch() -> None:
    images = [np.zeros((4, 4, 3), np.uint8), np.zeros((2, 8, 3), np.uint8)]
    [(batch, counted)] = full_batches(images, 2)
    assert ([image.shape for image in batch], counted) == ([(4, 4, 3), (2, 8, 3)], 2)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_images_are_refused(image: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"uint8 with shape \(height, width, 3\), not"):
        check_images([image])
    with pytest.raises(UsageError, match="uint8 with shape"):
        list(full_batches([image], 2))


def test_a_batch_has_images() -> None:
    with pytest.raises(UsageError, match="at least 1 image, not 0"):
        list(full_batches(np.zeros((1, 2, 2, 3), np.uint8), 0))


def test_only_inceptions_distance_has_the_plain_name() -> None:
    assert distance_name("FID", "Inception") == "FID"
    assert distance_name("KID", "clip") == "KID (features of clip)"
    assert distance_name("FID", "inception") == "FID (features of inception)"


def test_fingerprints_say_what_differs() -> None:
    assert FINGERPRINT.difference(FINGERPRINT.model_copy()) is None
    other = FINGERPRINT.model_copy(update={"preprocessing": "bicubic"})
    assert FINGERPRINT.difference(other) == "preprocessing 'none', not 'bicubic'"
    with pytest.raises(ValidationError, match="weights"):
        Fingerprint(name="clip", weights="abc", preprocessing="none")


def test_nothing_heavy_is_imported_for_numbers() -> None:
    modules = ("feature_extractor", "feature_statistics", "statistics_file", "distribution_distance", "metrics")
    modules += ("clip_scorer", "perceptual")
    program = "".join(f"import excise.eval.{module}\n" for module in modules)
    program += "import sys; print([name for name in ('torch', 'cleanfid', 'lpips', 'cv2') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
