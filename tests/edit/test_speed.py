"""SPEED against the paper's formula as it stands, a constrained least-squares solve for every layer, and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from excise.edit.speed import all_but_start, centres_of, null_basis, speed
from excise.edit.tokens import Concept, last_subject_pairs
from excise.edit.uce import Scales, uce
from excise.errors import NumericsError, UsageError

D, T = 16, 5
IDENTITY = torch.eye(D, dtype=torch.float64)

positive = st.floats(0.05, 10)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed: int, concepts: int = 2) -> tuple[list[Tensor], list[Concept], list[Tensor], Tensor]:
    """Weights of three heights, concepts, kept prompts that hardly use some directions, and a null prompt."""
    generator = torch.Generator().manual_seed(seed)
    weights = [normal(generator, o, D) for o in (5, 24, 11)]
    start = normal(generator, 1, D)

    def prompt(spread: Any = 1.0) -> Tensor:
        return torch.cat([start, spread * normal(generator, T - 1, D)])

    given = [Concept(prompt(), prompt(), tokens_length=3, target_length=2, start=1) for _ in range(concepts)]
    spread = torch.logspace(0.5, -2, D, dtype=torch.float64)
    return weights, given, [prompt(spread) for _ in range(9)], prompt()


def clear(seed: int, used: int = 5) -> list[Tensor]:
    """Kept prompts that use ``used`` directions, all above the threshold, and the others not at all."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(normal(generator, D, used)).Q.T
    return [3 * normal(generator, T, used) @ basis for _ in range(8)]


def literal_projector(kept: list[Tensor], threshold: float) -> Tensor:
    tokens = torch.cat([p[1:] for p in kept]).T
    u, s, _ = torch.linalg.svd(tokens @ tokens.T / tokens.shape[1])
    free: Tensor = u[:, s < threshold]
    return free @ free.T


def literal(weight: Tensor, concepts: list[Concept], p: Tensor, k2: Tensor, rho: float, lam: float) -> Tensor:
    """The paper's ``W + Δ``, columns as tokens, with its inverses."""
    c1 = torch.cat([c.tokens[1:] for c in concepts]).T
    c_star = torch.cat([c.target[1:] for c in concepts]).T
    m = torch.linalg.inv(c1 @ c1.T @ p + rho * IDENTITY)
    inner = torch.linalg.inv(k2.T @ p @ m @ k2 + lam * torch.eye(k2.shape[1], dtype=torch.float64))
    q = IDENTITY - m @ k2 @ inner @ k2.T @ p
    return weight + weight @ (c_star @ c1.T - c1 @ c1.T) @ p @ q @ m


def layer_by_layer(weight: Tensor, concepts: list[Concept], p: Tensor, k2: Tensor, rho: float, lam: float) -> Tensor:
    """min ‖Δ C − W(C* − C)‖² + ‖Δ K₂‖²/λ + ρ‖Δ‖² over Δ = X Nᵀ, N a basis of the null space, as least squares."""
    basis = torch.linalg.eigh(p).eigenvectors[:, torch.linalg.eigvalsh(p) > 0.5]
    tokens = torch.cat([c.tokens[1:] for c in concepts])
    change = torch.cat([c.target[1:] for c in concepts]) - tokens
    left = torch.cat([tokens @ basis, k2.T @ basis / lam**0.5, rho**0.5 * basis.T @ basis])
    right = torch.zeros(len(left), len(weight), dtype=torch.float64)
    right[: len(change)] = change @ weight.T
    solution: Tensor = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return weight + (basis @ solution).T


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    concepts=st.sampled_from([2, 4]),
    rho=positive,
    lam=positive,
    threshold=st.sampled_from([0.02, 0.1, 0.5]),
)
def test_equals_the_papers_formula_and_a_solve_for_every_layer(
    seed: int, concepts: int, rho: float, lam: float, threshold: float
) -> None:
    """Either side of the number of tokens that ``Fitter`` keeps as rows."""
    weights, erased, kept, null = problem(seed, concepts)
    transform = speed(erased, iter(kept), null=null, ridge=rho, null_ridge=lam, threshold=threshold)
    p = literal_projector(kept, threshold)
    k2 = torch.cat([null[:1], centres_of(null[1:], 3)]).T
    assert 0 < int(p.trace().round()) < D
    for weight in weights:
        edited = transform.on_weight(weight)
        # Measured over 400 draws: 1.8e-12 (its inverses) and 1.3e-13 at worst.
        expected = literal(weight, erased, p, k2, rho, lam)
        assert (edited - expected).norm() < 1e-11 * expected.norm()
        expected = layer_by_layer(weight, erased, p, k2, rho, lam)
        assert (edited - expected).norm() < 1e-11 * expected.norm()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), concepts=st.sampled_from([2, 4]))
def test_kept_prompts_stay_where_uce_moves_them(seed: int, concepts: int) -> None:
    """Theirs is no term to trade off: nothing in the null space reads them."""
    weights, erased, _, null = problem(seed, concepts)
    kept = clear(seed)
    transform = speed(erased, kept, null=null)
    moved = uce(weights, erased, kept, scales=Scales(keep=1, ridge=0.7))
    for prompt in kept:
        # Measured over 400 draws: 1.3e-14 at worst.
        assert (transform.on_tokens(prompt) - prompt)[1:].norm() < 1e-12 * prompt.norm()
        assert (moved.on_tokens(prompt) - prompt)[1:].norm() > 1e-4 * prompt.norm()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_concepts_become_their_targets_as_the_ridge_falls(seed: int) -> None:
    _, concepts, _, null = problem(seed)
    gaps = []
    for ridge in (1e0, 1e-4, 1e-6):
        transform = speed(concepts[:1], clear(seed, used=2), null=null, ridge=ridge)
        source, target = all_but_start(concepts[0])
        gaps.append(float((transform.on_tokens(source) - target).norm() / (source - target).norm()))
    assert gaps[0] > 0.01, "they are there anyway"
    # As ρ in the limit.
    assert gaps[1] < 0.05 * gaps[0]
    assert gaps[2] < 0.02 * gaps[1]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_the_null_prompt_stays_as_its_ridge_falls(seed: int) -> None:
    _, concepts, kept, null = problem(seed)
    held = torch.cat([null[:1], centres_of(null[1:], 3)])
    moved = []
    for ridge in (1e6, 1e-4, 1e-6):
        transform = speed(concepts, kept, null=null, null_ridge=ridge)
        moved.append(float((transform.on_tokens(held) - held).norm() / held.norm()))
    assert moved[0] > 0.01, "it doesn't move anyway"
    assert moved[1] < 0.01 * moved[0]
    assert moved[2] < 0.02 * moved[1]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    concepts=st.integers(1, 4),
    prompts=st.integers(0, 3),
    centres=st.integers(0, 6),
    positions=st.integers(1, 6),
    start=st.integers(0, 1),
)
def test_any_number_of_anything(
    seed: int, concepts: int, prompts: int, centres: int, positions: int, start: int
) -> None:
    """The start token is left out where there is one; the one position of a pooled embedding never is."""
    start = start if positions > 1 else 0
    generator = torch.Generator().manual_seed(seed)
    given = [
        Concept(normal(generator, positions, D), normal(generator, positions, D), positions, positions, start)
        for _ in range(concepts)
    ]
    kept = [0.3 * normal(generator, positions, D) for _ in range(prompts)]
    transform = speed(given, kept, null=normal(generator, positions, D), centres=centres)
    erased = concepts * (positions - start)
    assert transform.is_shared
    assert transform.factors()[0].shape == (D, min(erased, null_basis(kept, D, 0.1, start=start).shape[1]))


def test_many_tokens_leave_no_rounding_errors_beyond_the_null_space() -> None:
    """With a small ridge they move kept prompts by 6·10⁻⁶ and give the change all 64 dimensions; left out, by 10⁻¹⁵."""
    generator = torch.Generator().manual_seed(0)
    dim, used = 64, 20
    basis = torch.linalg.qr(normal(generator, dim, used)).Q.T
    kept = [3 * normal(generator, T, used) @ basis for _ in range(20)]
    erased = [Concept(10 * normal(generator, T, dim), 10 * normal(generator, T, dim), 3, 2, 1) for _ in range(20)]
    transform = speed(erased, kept, null=normal(generator, T, dim), ridge=1e-6)
    assert transform.factors()[0].shape == (dim, dim - used)
    for prompt in kept:
        assert (transform.on_tokens(prompt) - prompt)[1:].norm() < 1e-13 * prompt.norm()


def test_start_tokens_of_concepts_and_kept_prompts_are_not_read() -> None:
    _, concepts, kept, null = problem(1)
    expected = speed(concepts, kept, null=null).matrix()

    def other(tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:1] + 1, tokens[1:]])

    moved = [replace(c, tokens=other(c.tokens), target=other(c.target)) for c in concepts]
    assert torch.equal(speed(moved, map(other, kept), null=null).matrix(), expected)
    assert not torch.equal(speed(concepts, kept, null=other(null)).matrix(), expected)
    assert not torch.equal(speed(concepts, kept, null=null, rule=last_subject_pairs).matrix(), expected)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), rho=positive, lam=positive)
def test_without_a_start_token_every_position_counts(seed: int, rho: float, lam: float) -> None:
    """As with a start token of zeros before each prompt, which erases nothing, keeps nothing and holds nothing."""
    weights, concepts, kept, null = problem(seed)

    def after(tokens: Tensor) -> Tensor:
        return torch.cat([0 * tokens[:1], tokens])

    plain = [replace(c, start=0) for c in concepts]
    padded = [replace(c, tokens=after(c.tokens), target=after(c.target)) for c in concepts]
    transform = speed(plain, kept, null=null, ridge=rho, null_ridge=lam)
    expected = speed(padded, map(after, kept), null=after(null), ridge=rho, null_ridge=lam)
    dropped = speed(concepts, kept, null=null, ridge=rho, null_ridge=lam)
    for weight in weights:
        edited = transform.on_weight(weight)
        # Measured over 400 draws: 5.6e-15 at worst.
        assert (edited - expected.on_weight(weight)).norm() < 1e-11 * edited.norm()
        # Measured: 0.05 at least.
        assert (edited - dropped.on_weight(weight)).norm() > 1e-3 * edited.norm()


def test_erasing_nothing_is_the_identity() -> None:
    _, concepts, kept, null = problem(2)
    same = [replace(c, target=c.tokens) for c in concepts]
    assert torch.equal(speed(same, kept, null=null).matrix(), IDENTITY)


def test_nothing_kept_leaves_everything_free() -> None:
    basis = null_basis([], D, 0.1, start=1)
    assert torch.equal(basis @ basis.T, IDENTITY)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), sizes=st.lists(st.integers(1, 6), min_size=5, max_size=5))
def test_centres_of_clusters_that_are_far_apart(seed: int, count: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    clusters = [50 * IDENTITY[i] + normal(generator, sizes[i], D) for i in range(count)]
    tokens = torch.cat(clusters)
    tokens = tokens[torch.randperm(len(tokens), generator=generator)]
    found = centres_of(tokens, count)
    expected = torch.stack([cluster.mean(dim=0) for cluster in clusters])
    nearest = torch.cdist(expected, found).argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(count))
    torch.testing.assert_close(found[nearest], expected, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 20), count=st.integers(0, 5))
def test_every_centre_is_the_mean_of_the_rows_nearest_to_it(seed: int, rows: int, count: int) -> None:
    tokens = normal(torch.Generator().manual_seed(seed), rows, 2)
    found = centres_of(tokens, count)
    assert found.shape == (min(rows, count), 2)
    if len(found):
        nearest = torch.cdist(tokens, found).argmin(dim=1)
        for index, centre in enumerate(found):
            torch.testing.assert_close(centre, tokens[nearest == index].mean(dim=0), rtol=0, atol=1e-12)


def test_equal_rows_have_one_centre() -> None:
    assert torch.equal(centres_of(torch.ones(9, D), 3), torch.ones(1, D))


def test_refusals() -> None:
    _, concepts, kept, null = problem(3)
    with pytest.raises(UsageError, match="no concept"):
        speed([], kept, null=null)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="null_ridge = "):
            speed(concepts, kept, null=null, null_ridge=bad)
        with pytest.raises(UsageError, match="threshold = "):
            speed(concepts, kept, null=null, threshold=bad)
    with pytest.raises(UsageError, match="ridge = -1"):
        speed(concepts, kept, null=null, ridge=-1)
    with pytest.raises(UsageError, match="centres = -1"):
        speed(concepts, kept, null=null, centres=-1)
    with pytest.raises(UsageError, match="null has no tokens"):
        speed(concepts, kept, null=null[:0])
    for wrong in ([*kept, kept[0][:, 1:]], [kept[0][0]]):
        with pytest.raises(UsageError, match="embeddings of shape"):
            speed(concepts, wrong, null=null)
    with pytest.raises(UsageError, match="embeddings of shape"):
        speed([concepts[0], Concept(null[:, 1:], null[:, 1:], 2, 2)], kept, null=null)
    with pytest.raises(NumericsError, match="embedding holds inf or nan"):
        speed(concepts, [kept[0] * float("nan")], null=null)
    with pytest.raises(NumericsError, match="inf or nan"):
        speed(concepts, [kept[0] * 1e200], null=null)
    with pytest.raises(NumericsError, match="ridge = 0: raise ridge"):
        speed(concepts, kept, null=null, ridge=0)
    with pytest.raises(NumericsError, match=f"use all {D} directions above threshold = 1e-09: raise it"):
        speed(concepts, kept, null=null, threshold=1e-9)
