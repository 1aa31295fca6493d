"""CLIP score and Fréchet distance against closed forms and another algorithm."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.linalg import svdvals

from excise.errors import UsageError
from excise.eval.metrics import clip_score, fid, fid_name


def unit_rows(n: int, d: int, seed: int) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def factored_fid(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Without a matrix square root: tr (Σ₁Σ₂)^½ is the sum of the singular values of A Bᵀ, rows centred and scaled."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    left = (a64 - a64.mean(0)) / np.sqrt(len(a) - 1)
    right = (b64 - b64.mean(0)) / np.sqrt(len(b) - 1)
    gap = a64.mean(0) - b64.mean(0)
    return float(gap @ gap + (left**2).sum() + (right**2).sum() - 2 * svdvals(left @ right.T).sum())


def test_clip_score_clips_each_pair_at_zero() -> None:
    images = np.array([[1, 0], [0.6, 0.8], [-1, 0]], np.float32)
    texts = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    assert clip_score(images, texts) == pytest.approx(100 * (1 + 0.6 + 0) / 3, rel=1e-6)


def test_clip_score_needs_pairs() -> None:
    with pytest.raises(UsageError, match="pairs"):
        clip_score(unit_rows(2, 3, 0), unit_rows(3, 3, 0))


# With fewer images than features the square root of a singular product is only good to about 1e-7.
@pytest.mark.parametrize(("n", "tolerance"), [(200, 1e-10), (8, 1e-6)])
def test_fid_equals_the_factored_form(n: int, tolerance: float) -> None:
    a, b = unit_rows(n, 16, 1), unit_rows(n, 16, 2)
    assert fid(a, b) == pytest.approx(factored_fid(a, b), abs=tolerance)
    assert fid(a, b) == pytest.approx(fid(b, a), abs=tolerance)


def test_fid_of_a_shift_is_its_square() -> None:
    a = unit_rows(100, 8, 3)
    assert fid(a, a + np.float32(0.5)) == pytest.approx(8 * 0.25, rel=1e-5)


def test_fid_of_the_same_set_is_zero() -> None:
    assert 0 <= fid(unit_rows(8, 16, 4), unit_rows(8, 16, 4)) < 1e-6


def test_fid_needs_two_images() -> None:
    with pytest.raises(UsageError, match="two images"):
        fid(unit_rows(1, 4, 0), unit_rows(4, 4, 0))


def test_fid_is_named_after_its_features() -> None:
    assert fid_name("clip") == "FID (features of clip)"
