"""Squared distances of images in files, against numpy's own, and PSNR against the one of ``perceptual``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from excise.errors import UsageError
from excise.eval.image_file import ImageMetadata, encode_image
from excise.eval.observation_cache import Pictures
from excise.eval.perceptual import psnr
from excise.eval.pixel_movement import movements, psnr_of

SHAPE = (5, 7, 3)


def drawn(seed: int, count: int = 6, shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def kept(folder: Path, images: npt.NDArray[np.uint8]) -> Pictures:
    folder.mkdir()
    files = []
    for number, image in enumerate(images):
        files.append(folder / f"{number}.png")
        metadata = ImageMetadata(str(number), "a cat", "", 0, 1.0, 1, folder.name, None, "0" * 64)
        files[-1].write_bytes(encode_image(image, metadata))
    return Pictures(files)


def test_squared_distances_and_psnr(tmp_path: Path) -> None:
    images = {"base": drawn(0), "edited": drawn(1), "served": drawn(1)}
    images["served"][0, 0, 0] ^= 1
    # The farthest that two images can be: int32 holds a square, int64 the sum.
    images["base"][5], images["edited"][5] = 0, 255
    pictures = {name: kept(tmp_path / name, rows) for name, rows in images.items()}
    pairs = [("base", "edited"), ("edited", "served")]
    squared, size = movements(pictures, pairs)
    assert size == 5 * 7 * 3
    assert list(squared) == pairs
    for (first, second), sums in squared.items():
        a, b = images[first].astype(np.float64), images[second].astype(np.float64)
        assert sums.tolist() == ((a - b) ** 2).sum((1, 2, 3)).tolist()
        assert np.array_equal(psnr_of(sums, size), psnr(images[first], images[second]))
    assert squared["base", "edited"][5] == 255**2 * size
    assert psnr_of(squared["base", "edited"], size)[5] == 0
    assert np.isinf(psnr_of(squared["edited", "served"], size)[1])


def test_only_what_is_compared_is_read(tmp_path: Path) -> None:
    pictures = {"base": kept(tmp_path / "base", drawn(0)), "gone": Pictures([tmp_path / "no.png"] * 6)}
    assert movements(pictures, []) == ({}, 0)
    squared, _ = movements(pictures, [("base", "base")])
    assert squared["base", "base"].tolist() == [0] * 6


def test_two_sizes_are_refused(tmp_path: Path) -> None:
    pictures = {"base": kept(tmp_path / "base", drawn(0)), "big": kept(tmp_path / "big", drawn(0, shape=(8, 6, 3)))}
    with pytest.raises(UsageError, match="big makes images of 6 x 8 pixels, base of 7 x 5: runtimes are compared at"):
        movements(pictures, [("base", "big")])
