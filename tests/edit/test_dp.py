"""Double Projections against the paper's formula for one token and the smallest change under its constraints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from excise.edit.dp import dp, free_basis, onto_span
from excise.edit.tokens import Concept, all_pairs, last_subject_pairs
from excise.edit.transform import Transform
from excise.edit.uce import Scales, uce
from excise.errors import NumericsError, UsageError

D, T = 24, 4
IDENTITY = torch.eye(D, dtype=torch.float64)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed: int, concepts: int = 2) -> tuple[list[Tensor], list[Concept], list[Tensor]]:
    """Weights of three heights, concepts that erase 3 tokens each, and kept prompts of 10 tokens of rank 9."""
    generator = torch.Generator().manual_seed(seed)
    weights = [normal(generator, o, D) for o in (5, 30, 11)]
    given = [Concept(normal(generator, T, D), normal(generator, T, D), 3, 2) for _ in range(concepts)]
    kept = [normal(generator, 6, D), normal(generator, 4, D)]
    kept[1][0] = kept[0][0] - 2 * kept[0][1]
    return weights, given, kept


def last_token(concept: Concept) -> tuple[Tensor, Tensor]:
    return concept.tokens[-1:], concept.target[-1:]


def formula(weight: Tensor, concept: Concept, kept: list[Tensor]) -> Tensor:
    """The paper's ``W + ΔW`` for one token, columns as tokens."""
    c, s, k = concept.tokens[-1:].T, concept.target.T, torch.cat(kept).T
    c_star = s @ torch.linalg.pinv(s.T @ s) @ s.T @ c
    left, values, _ = torch.linalg.svd(k, full_matrices=True)
    u2 = left[:, int((values > 1e-10 * values[0]).sum()) :]
    x = u2.T @ c
    changed: Tensor = weight + weight @ (c_star - c) @ x.T / x.norm() ** 2 @ u2.T
    return changed


def safe(concept: Concept, tokens: Tensor) -> Tensor:
    """``c*`` by least squares: the combination of the target's tokens that comes nearest to c."""
    weights = torch.linalg.lstsq(concept.target.T, tokens.T, driver="gelsd").solution
    nearest: Tensor = weights.T @ concept.target
    return nearest


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_one_token_is_the_papers_formula(seed: int) -> None:
    weights, concepts, kept = problem(seed)
    transform = dp(concepts[:1], iter(kept), rule=last_token)
    assert transform.factors()[0].shape == (D, 1)
    for weight in weights:
        expected = formula(weight, concepts[0], kept)
        # Measured over 400 draws: 1.0e-15 at worst.
        assert (transform.on_weight(weight) - expected).norm() < 1e-13 * expected.norm()
        assert (expected - weight).norm() > 0.01 * weight.norm()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4))
def test_several_are_the_smallest_change_under_all_constraints(seed: int, concepts: int) -> None:
    """One stacked system for every layer, solved for its least norm."""
    weights, given, kept = problem(seed, concepts)
    transform = dp(given, kept)
    tokens = torch.cat([last_subject_pairs(c)[0] for c in given])
    change = torch.cat([safe(c, last_subject_pairs(c)[0]) for c in given]) - tokens
    for weight in weights:
        left = torch.cat([*kept, tokens])
        right = torch.cat([torch.zeros(10, len(weight), dtype=torch.float64), change @ weight.T])
        expected = torch.linalg.lstsq(left, right, rcond=1e-10, driver="gelsd").solution.T
        # Measured over 400 draws: 9.7e-15 at worst.
        assert (transform.on_weight(weight) - weight - expected).norm() < 1e-12 * expected.norm()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4))
def test_kept_tokens_do_not_move_at_all_and_concepts_become_safe(seed: int, concepts: int) -> None:
    weights, given, kept = problem(seed, concepts)
    transform = dp(given, kept)
    traded = uce(weights, given, kept, scales=Scales(keep=1, ridge=0.5))
    for prompt in kept:
        # Measured over 400 draws: 1.4e-15 at worst.
        assert (transform.on_tokens(prompt) - prompt).norm() < 1e-12 * prompt.norm()
        assert (traded.on_tokens(prompt) - prompt).norm() > 1e-3 * prompt.norm()
    for concept in given:
        tokens, _ = last_subject_pairs(concept)
        target = safe(concept, tokens)
        # Measured over 400 draws: 9.3e-15 at worst.
        assert (transform.on_tokens(tokens) - target).norm() < 1e-12 * tokens.norm()
        assert (tokens - target).norm() > 0.1 * tokens.norm()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_concepts_does_not_matter_where_one_after_the_other_undoes(seed: int) -> None:
    _, concepts, kept = problem(seed)
    together = dp(concepts, kept)
    swapped = dp(concepts[::-1], kept)
    torch.testing.assert_close(swapped.matrix(), together.matrix(), rtol=0, atol=1e-11)
    # W ← W M₁, then (W M₁) M₂, each by itself.
    first, second = (dp([concept], kept) for concept in concepts)
    sequence = Transform((*first.steps, *second.steps), D)
    tokens, _ = last_subject_pairs(concepts[0])
    target = safe(concepts[0], tokens)
    assert (first.on_tokens(tokens) - target).norm() < 1e-11 * tokens.norm()
    assert (sequence.on_tokens(tokens) - target).norm() > 0.01 * tokens.norm()


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    concepts=st.integers(1, 12),
    prompts=st.integers(0, 5),
    positions=st.integers(1, 4),
)
def test_any_number_of_anything(seed: int, concepts: int, prompts: int, positions: int) -> None:
    """More tokens than free directions too: least squares, and kept tokens as still as ever."""
    generator = torch.Generator().manual_seed(seed)
    given = [
        Concept(normal(generator, positions, D), normal(generator, positions, D), positions, positions)
        for _ in range(concepts)
    ]
    kept = [normal(generator, positions, D) for _ in range(prompts)]
    transform = dp(given, kept, rule=all_pairs)
    rank = min(concepts * positions, D - prompts * positions)
    assert transform.factors(tolerance=1e-11)[0].shape == (D, rank)
    for prompt in kept:
        assert (transform.on_tokens(prompt) - prompt).norm() < 1e-11 * prompt.norm()


def test_two_targets_for_one_token_are_averaged() -> None:
    """No rounding error is taken for a difference of the two."""
    _, concepts, kept = problem(2)
    same = [Concept(concepts[0].tokens, c.target, 3, 2) for c in concepts]
    tokens, _ = last_subject_pairs(concepts[0])
    between = (safe(same[0], tokens) + safe(same[1], tokens)) / 2
    torch.testing.assert_close(dp(same, kept).on_tokens(tokens), between, rtol=0, atol=1e-12)


def test_a_token_in_the_safe_subspace_and_a_kept_one_stay() -> None:
    """As the start token of all prompts does."""
    _, concepts, _ = problem(0, concepts=1)
    start, concept = concepts[0].tokens[:1], concepts[0]
    shared = Concept(concept.tokens, torch.cat([start, concept.target[1:]]), 3, 2)
    for prompts in ([], [start]):
        transform = dp([shared], prompts, rule=all_pairs)
        assert (transform.on_tokens(start) - start).norm() < 1e-12 * start.norm()
        reached = transform.on_tokens(concept.tokens[1:]) - onto_span(shared.target, concept.tokens[1:], 1e-12)
        assert reached.norm() < 1e-12 * concept.tokens.norm()


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), max_size=5),
)
def test_the_basis_is_all_that_is_orthogonal(seed: int, shapes: list[tuple[int, int]]) -> None:
    """Every prompt uses directions of its own: none is forgotten when the next are read."""
    generator = torch.Generator().manual_seed(seed)
    kept = [normal(generator, rows, rank) @ normal(generator, rank, D) for rows, rank in shapes]
    basis, left = free_basis(iter(kept), D, 1e-12)
    assert left < 1e-12
    assert basis.shape == (D, D - sum(map(min, shapes)))
    torch.testing.assert_close(basis.T @ basis, IDENTITY[: basis.shape[1], : basis.shape[1]], rtol=0, atol=1e-13)
    for tokens in kept:
        # Measured over 400 draws: 3.5e-15 at worst.
        assert (tokens @ basis).norm() < 1e-13 * tokens.norm()


def test_directions_that_are_hardly_used_are_kept_all_the_same() -> None:
    """At 10⁻⁹ of the largest: in KᵀK that is 10⁻¹⁸, which is lost."""
    generator = torch.Generator().manual_seed(0)
    tokens = normal(generator, 40, 3) @ torch.linalg.qr(normal(generator, D, 3)).Q.T
    faint = normal(generator, 1, D)
    kept = [tokens, 1e-9 * faint]
    basis, _ = free_basis(kept, D, 1e-12)
    assert basis.shape == (D, D - 4)
    assert (faint @ basis).norm() < 1e-5
    squared = torch.cat(kept).T @ torch.cat(kept)
    lost = torch.linalg.eigh(squared).eigenvectors[:, : D - 4]
    assert (faint @ lost).norm() > 1e-5
    # Unless it is asked for, or float32 couldn't tell.
    for tolerance in (1e-6, None):
        basis, left = free_basis(kept, D, tolerance)
        assert basis.shape == (D, D - 3)
        assert left == pytest.approx(float(1e-9 * (faint @ basis).norm()), rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), prompts=st.integers(1, 40))
def test_the_rounding_of_float32_is_no_direction(seed: int, prompts: int) -> None:
    """Kept tokens of rank 8 as a text encoder gives them; to the last bit of float64 they span everything."""
    generator = torch.Generator().manual_seed(seed)
    directions = normal(generator, 8, D)
    exact = [normal(generator, 6, 8) @ directions for _ in range(prompts)]
    kept = [tokens.float() for tokens in exact]
    rank = min(8, 6 * prompts)
    assert free_basis(kept, D, None)[0].shape == (D, D - rank)
    if 6 * prompts >= D:
        with pytest.raises(NumericsError, match="span all 24"):
            free_basis(kept, D, 1e-12)
    concept = Concept(normal(generator, 5, D), normal(generator, 5, D), 3, 2)
    transform = dp([concept], kept)
    for tokens in exact:
        # Measured over 2000 draws: 1.9e-8 at worst.
        assert (transform.on_tokens(tokens) - tokens).norm() < 1e-5 * tokens.norm()
    tokens, _ = last_subject_pairs(concept)
    assert (transform.on_tokens(tokens) - safe(concept, tokens)).norm() < 1e-12 * tokens.norm()


def test_what_differs_from_kept_tokens_by_rounding_alone_is_not_erased() -> None:
    """Else a step as large as the difference is small would take the kept tokens along."""
    generator = torch.Generator().manual_seed(0)
    directions = normal(generator, 8, D)
    kept = [(normal(generator, 6, 8) @ directions).float() for _ in range(20)]
    twin = torch.cat([kept[0][:4].double() * (1 + 1e-7), normal(generator, 1, D)])
    concept = Concept(twin, normal(generator, 5, D), 3, 2)
    transform = dp([concept], kept, rule=all_pairs)
    assert transform.factors(tolerance=1e-9)[0].shape == (D, 1)
    for tokens in kept:
        assert (transform.on_tokens(tokens.double()) - tokens.double()).norm() < 1e-5 * tokens.norm()
    with pytest.raises(NumericsError, match="concept 0 lies in the span of the kept tokens"):
        dp([Concept(twin[:4], twin[:4], 3, 2)], kept, rule=all_pairs)


def test_projection_on_a_span() -> None:
    generator = torch.Generator().manual_seed(0)
    safe_tokens, tokens = normal(generator, 3, D), normal(generator, 5, D)
    projected = onto_span(torch.cat([safe_tokens, safe_tokens]), tokens, 1e-12)
    torch.testing.assert_close(onto_span(safe_tokens, projected, 1e-12), projected, rtol=0, atol=1e-13)
    torch.testing.assert_close((tokens - projected) @ safe_tokens.T, torch.zeros(5, 3).double(), rtol=0, atol=1e-12)
    assert torch.equal(onto_span(0 * safe_tokens, tokens, 1e-12), 0 * tokens)


def test_refusals() -> None:
    _, concepts, kept = problem(1)
    with pytest.raises(UsageError, match="no concept"):
        dp([], kept)
    for bad in (-1.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="rank_tolerance = "):
            dp(concepts, kept, rank_tolerance=bad)
        with pytest.raises(UsageError, match="reach_tolerance = "):
            dp(concepts, kept, reach_tolerance=bad)
    with pytest.raises(UsageError, match=r"give \(tokens, 24\)"):
        dp(concepts, [kept[0][:, 1:]])
    with pytest.raises(UsageError, match=r"give \(tokens, 24\)"):
        dp([concepts[0], Concept(kept[0][:, 1:], kept[0][:, 1:], 2, 2)], kept)
    with pytest.raises(NumericsError, match="embedding holds inf or nan"):
        dp(concepts, [kept[0] * float("nan")])
    with pytest.raises(NumericsError, match="span all 24 directions: keep fewer"):
        dp(concepts, [IDENTITY])
    with pytest.raises(NumericsError, match="concept 1 lies in the span of the kept tokens"):
        dp(concepts, [*kept, concepts[1].tokens])
