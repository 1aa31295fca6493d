"""CLIP score and Fréchet distance against closed forms and clean-fid's algorithm."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from cleanfid.fid import fid_from_feats

from excise.errors import UsageError
from excise.eval.metrics import clip_score, clip_scores, fid, fid_name


def unit_rows(n: int, d: int, seed: int) -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def cleanfid_distance(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """By the square root of the covariances' product."""
    with warnings.catch_warnings():
        # clean-fid 0.1.35 calls scipy.linalg.sqrtm(disp=False), which SciPy 1.17 deprecates.
        warnings.filterwarnings("ignore", "The `disp` argument is deprecated", DeprecationWarning)
        return float(fid_from_feats(a.astype(np.float64), b.astype(np.float64)))


def test_clip_score_clips_each_pair_at_zero() -> None:
    images = np.array([[1, 0], [0.6, 0.8], [-1, 0]], np.float32)
    texts = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    np.testing.assert_allclose(clip_scores(images, texts), [100, 60, 0], rtol=1e-6)
    assert clip_score(images, texts) == pytest.approx(100 * (1 + 0.6 + 0) / 3, rel=1e-6)


def test_clip_score_needs_pairs() -> None:
    with pytest.raises(UsageError, match="pairs"):
        clip_score(unit_rows(2, 3, 0), unit_rows(3, 3, 0))
    with pytest.raises(UsageError, match="at least one"):
        clip_score(unit_rows(2, 3, 0)[:0], unit_rows(2, 3, 0)[:0])


# With fewer images than features clean-fid's square root of a singular product is only good to about 1e-7.
@pytest.mark.parametrize(("n", "tolerance"), [(200, 1e-10), (8, 1e-6)])
def test_fid_is_clean_fids(n: int, tolerance: float) -> None:
    a, b = unit_rows(n, 16, 1), unit_rows(n, 16, 2)
    assert fid(a, b) == pytest.approx(cleanfid_distance(a, b), abs=tolerance)
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
