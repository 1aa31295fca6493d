"""Distances position by position: what the whole encoder gives, for less work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel

from excise.eval.causal_text import CausalText, Past, bounded_distances


class Counting(CausalText):
    """Counts the positions that it computes."""

    computed = 0

    def __call__(self, ids: Tensor, start: int, past: Past) -> tuple[Tensor, Past]:
        self.computed += ids.numel()
        return super().__call__(ids, start, past)


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> Any:
    return CLIPTextModel.from_pretrained(tiny_model / "text_encoder").eval()


def rows(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    ids = np.full((count, 24), 710, np.int64)
    ids[:, 0], ids[:, 1:9] = 709, np.random.default_rng(seed).integers(1, 709, (count, 8))
    return ids


@torch.no_grad()
def whole(encoder: Any, ids: npt.NDArray[np.int64], target: Tensor) -> npt.NDArray[np.float64]:
    """The oracle: transformers' own forward pass, one row at a time."""
    states = [encoder(torch.from_numpy(row[None]))[0][0] for row in ids]
    return np.array([float((one.double() - target.double()).square().sum()) for one in states])


@pytest.fixture(scope="module")
def target(encoder: Any) -> Tensor:
    with torch.no_grad():
        states: Tensor = encoder(torch.from_numpy(rows(1, seed=9)))[0][0]
    return states


@pytest.mark.parametrize("stride", [1, 4, 7, 24, 50])
def test_distances_are_the_whole_encoders(encoder: Any, target: Tensor, stride: int) -> None:
    ids = rows(6)
    found = bounded_distances(CausalText(encoder.text_model), ids, target, stride=stride)
    # Measured: 6e-7.
    np.testing.assert_allclose(found, whole(encoder, ids, target), rtol=1e-5)


def test_rows_below_the_bound_are_exact_and_those_above_stay_above(encoder: Any, target: Tensor) -> None:
    ids = rows(40)
    exact = whole(encoder, ids, target)
    bound = float(np.median(exact))
    model = Counting(encoder.text_model)
    found = bounded_distances(model, ids, target, bound=bound, stride=4)
    inside = exact <= bound
    np.testing.assert_allclose(found[inside], exact[inside], rtol=1e-5)
    assert (found[~inside] > bound).all()
    assert (found[~inside] <= exact[~inside] * (1 + 1e-5)).all()
    assert model.computed < ids.size


def test_a_bound_that_all_pass_ends_at_once(encoder: Any, target: Tensor) -> None:
    model = Counting(encoder.text_model)
    assert (bounded_distances(model, rows(5), target, bound=0.0, stride=4) > 0).all()
    # The start token and three others are known to be too far, but for the start token's exact 0.
    assert model.computed == 5 * 4


def test_what_rows_have_in_common_is_computed_once(encoder: Any, target: Tensor) -> None:
    ids = np.repeat(rows(1), 10, axis=0)
    ids[:, 8] = np.arange(1, 11)
    model = Counting(encoder.text_model)
    found = bounded_distances(model, ids, target, stride=4)
    assert model.computed == 8 + 10 * 16
    np.testing.assert_allclose(found, whole(encoder, ids, target), rtol=1e-5)


def test_equal_rows_have_equal_distances_and_none_has_none(encoder: Any, target: Tensor) -> None:
    model = Counting(encoder.text_model)
    found = bounded_distances(model, np.repeat(rows(1), 3, axis=0), target, stride=8)
    assert model.computed == 24
    assert len(set(found.tolist())) == 1
    assert bounded_distances(model, rows(0), target).shape == (0,)


def test_what_is_no_number_is_seen(encoder: Any, target: Tensor) -> None:
    broken = target.clone()
    broken[3] = math.nan
    assert np.isnan(bounded_distances(CausalText(encoder.text_model), rows(2), broken, bound=1e12, stride=4)).all()
