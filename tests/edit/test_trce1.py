"""TRCE's first stage as the limit of UCE, as least squares of least norm for every layer, and its theorem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from excise.edit.tokens import Concept
from excise.edit.trce1 import first_end_pairs, trce1
from excise.edit.uce import Scales, uce
from excise.errors import NumericsError, UsageError

D, T = 20, 7

positive = st.floats(0.1, 10)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed: int, kept: int, concepts: int = 2) -> tuple[list[Tensor], list[Concept], list[Tensor]]:
    """Weights of three heights, concepts, and prompts of ``kept`` tokens in all."""
    generator = torch.Generator().manual_seed(seed)
    weights = [normal(generator, o, D) for o in (5, 24, 11)]
    given = [
        Concept(normal(generator, T, D), normal(generator, T, D), tokens_length=3 + i, target_length=2)
        for i in range(concepts)
    ]
    return weights, given, list(normal(generator, kept, D).split(T))


def layer_by_layer(weight: Tensor, concepts: list[Concept], kept: list[Tensor], erase: float, keep: float) -> Tensor:
    """The change of least norm among those that minimise the two terms, as one stacked least-squares problem."""
    pairs = [(c.tokens[c.tokens_length - 1], c.target[c.target_length - 1]) for c in concepts]
    left = torch.stack([erase**0.5 * c for c, _ in pairs] + [keep**0.5 * p for prompt in kept for p in prompt])
    right = torch.zeros(len(left), len(weight), dtype=torch.float64)
    right[: len(pairs)] = torch.stack([erase**0.5 * weight @ (target - c) for c, target in pairs])
    change: Tensor = torch.linalg.lstsq(left, right, rcond=1e-10, driver="gelsd").solution
    return weight + change.T


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), kept=st.integers(0, 60), erase=positive, keep=positive)
def test_equals_a_solve_for_every_layer(seed: int, kept: int, erase: float, keep: float) -> None:
    """Either side of the number of kept tokens that span everything."""
    weights, concepts, prompts = problem(seed, kept)
    transform = trce1(concepts, iter(prompts), erase_scale=erase, keep_scale=keep)
    assert transform.is_shared
    for weight in weights:
        expected = layer_by_layer(weight, concepts, prompts, erase, keep)
        # Measured over 400 draws: 1.6e-13 at worst.
        assert (transform.on_weight(weight) - expected).norm() < 1e-11 * expected.norm()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), kept=st.sampled_from([0, 4, 12, 40]), keep=positive)
def test_is_the_limit_of_uce(seed: int, kept: int, keep: float) -> None:
    weights, concepts, prompts = problem(seed, kept)
    limit = trce1(concepts, prompts, keep_scale=keep).matrix()
    gaps = []
    for ridge in (1e-1, 1e-3, 1e-5):
        scales = Scales(keep=keep, ridge=ridge)
        step = uce(weights, concepts, prompts, scales=scales, rule=first_end_pairs).matrix()
        gaps.append(float((step - limit).norm() / limit.norm()))
    # As λ₂ in the limit.
    assert gaps[1] < 0.1 * gaps[0]
    assert gaps[2] < 0.02 * gaps[1]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), kept=st.integers(1, 12), keep=positive)
def test_concepts_become_their_targets_and_kept_tokens_stay(seed: int, kept: int, keep: float) -> None:
    """With fewer tokens than dimensions there is nothing to trade off, where UCE's ridge gives up some of both."""
    weights, concepts, prompts = problem(seed, kept)
    transform = trce1(concepts, prompts, keep_scale=keep)
    ridged = uce(weights, concepts, prompts, scales=Scales(keep=1, ridge=0.5), rule=first_end_pairs)
    for concept in concepts:
        tokens, targets = first_end_pairs(concept)
        # Measured over 400 draws: 1.5e-14 at worst.
        assert (transform.on_tokens(tokens) - targets).norm() < 1e-11 * targets.norm()
        assert (ridged.on_tokens(tokens) - targets).norm() > 1e-3 * targets.norm()
        assert (tokens - targets).norm() > 0.1 * targets.norm()
    for prompt in prompts:
        # Measured over 400 draws: 7.3e-15 at worst.
        assert (transform.on_tokens(prompt) - prompt).norm() < 1e-11 * prompt.norm()


def test_kept_tokens_hold_the_concept_back_once_they_span_everything() -> None:
    _, concepts, prompts = problem(0, 60)
    tokens, targets = first_end_pairs(concepts[0])
    gaps = [
        float((trce1(concepts, prompts, keep_scale=keep).on_tokens(tokens) - targets).norm() / targets.norm())
        for keep in (1e-6, 1e-2, 1.0, 1e4)
    ]
    assert gaps == sorted(gaps)
    assert gaps[0] < 1e-4
    assert gaps[-1] > 0.5


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), kept=st.integers(0, 9), concepts=st.integers(1, 5))
def test_directions_that_no_token_uses_stay(seed: int, kept: int, concepts: int) -> None:
    _, given, prompts = problem(seed, kept, concepts)
    transform = trce1(given, prompts)
    assert transform.factors()[0].shape == (D, concepts)
    used = torch.cat([first_end_pairs(c)[0] for c in given] + prompts)
    other = torch.linalg.svd(used, full_matrices=True)[2][len(used) :]
    assert (transform.on_tokens(other) - other).norm() < 1e-11
    outputs = transform.on_tokens(normal(torch.Generator().manual_seed(seed), 3, D))
    assert outputs.shape == (3, D)


def test_the_first_end_of_text_token_and_no_other() -> None:
    _, concepts, prompts = problem(1, 9, concepts=1)
    expected = trce1(concepts, prompts).matrix()
    for position in range(T):
        tokens = concepts[0].tokens.clone()
        tokens[position] += 1
        changed = trce1([Concept(tokens, concepts[0].target, 3, 2)], prompts).matrix()
        assert torch.equal(changed, expected) is (position != 2)
    pooled = Concept(concepts[0].tokens[:1], concepts[0].target[:1], 1, 1)
    assert torch.equal(torch.cat(first_end_pairs(pooled)), torch.cat([pooled.tokens, pooled.target]))


def test_tokens_that_depend_on_one_another_are_averaged() -> None:
    """Two targets for one token: no rounding error is taken for a difference of the two."""
    _, concepts, prompts = problem(2, 5)
    first, second = (c.target[1] for c in concepts)
    same = [Concept(concepts[0].tokens, c.target, 3, 2) for c in concepts]
    moved = trce1(same, prompts).on_tokens(concepts[0].tokens[2])
    torch.testing.assert_close(moved, (first + second) / 2, rtol=0, atol=1e-11)


def test_erasing_nothing_is_the_identity() -> None:
    _, concepts, prompts = problem(3, 9)
    same = [Concept(c.tokens, c.tokens, 4, 4) for c in concepts]
    assert torch.equal(trce1(same, prompts).matrix(), torch.eye(D, dtype=torch.float64))


def test_refusals() -> None:
    _, concepts, prompts = problem(4, 9)
    with pytest.raises(UsageError, match="no concept"):
        trce1([], prompts)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="erase = "):
            trce1(concepts, prompts, erase_scale=bad)
        with pytest.raises(UsageError, match="keep = "):
            trce1(concepts, prompts, keep_scale=bad)
    for bad in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="tolerance = "):
            trce1(concepts, prompts, tolerance=bad)
    with pytest.raises(UsageError, match=r"give \(tokens, 20\)"):
        trce1(concepts, [prompts[0][:, 1:]])
    with pytest.raises(UsageError, match=r"give \(tokens, 20\)"):
        trce1([concepts[0], Concept(prompts[0][:, 1:], prompts[0][:, 1:], 2, 2)], prompts)
    with pytest.raises(NumericsError, match="embedding holds inf or nan"):
        trce1(concepts, [prompts[0] * float("nan")])
    with pytest.raises(NumericsError, match="inf or nan"):
        trce1(concepts, [prompts[0] * 1e200])
