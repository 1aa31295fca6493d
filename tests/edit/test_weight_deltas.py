"""What an edit of deltas gives back of the trained weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from excise.edit.weight_deltas import weight_deltas
from excise.errors import NumericsError


def test_weights_within_a_factor_of_two_come_back_exactly() -> None:
    rng = torch.Generator().manual_seed(0)
    old = torch.randn(200, 200, generator=rng)
    old[0] = 0
    factor = 0.5 + 1.5 * torch.rand(200, 200, generator=rng)
    new = old * factor.clamp(0.5, 2.0)
    new[0] = torch.randn(200, generator=rng)
    (delta,) = weight_deltas({"w": old}, {"w": new}).values()
    assert torch.equal(old + delta, new)


def test_any_other_weight_is_within_a_unit_in_the_last_place() -> None:
    rng = torch.Generator().manual_seed(1)
    old, new = torch.randn(2, 300, 300, generator=rng) * 10 ** torch.empty(2, 300, 300).uniform_(-4, 4, generator=rng)
    (delta,) = weight_deltas({"w": old}, {"w": new}).values()
    unit = np.spacing(np.maximum(np.abs(old.numpy()), np.abs(new.numpy())))
    missed = np.abs((old + delta).numpy().astype(np.float64) - new.numpy())
    assert (missed <= unit).all()
    # The bound is worth stating: such weights don't come back exactly.
    assert (missed > 0).any()


def test_only_what_moved_is_kept() -> None:
    before = {"b": torch.ones(2), "a": torch.zeros(3)}
    after = {"b": torch.ones(2), "a": torch.tensor([0.0, 1.0, 0.0])}
    deltas = weight_deltas(before, after)
    assert {name: delta.tolist() for name, delta in deltas.items()} == {"a": [0.0, 1.0, 0.0]}
    with pytest.raises(NumericsError, match="training moved no weight: give more --iterations"):
        weight_deltas(before, before)
    with pytest.raises(NumericsError, match="b isn't finite after training"):
        weight_deltas(before, {"b": torch.tensor([1.0, torch.nan]), "a": torch.zeros(3)})
