"""LEACE: what a least-squares probe finds before and after, first-order optimality, and the projection it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from excise.edit.leace import LeaceFitter, leace
from excise.edit.tokens import Concept, last_subject_pairs
from excise.edit.transform import Transform
from excise.errors import NumericsError, UsageError

D, T = 12, 9
IDENTITY = torch.eye(D, dtype=torch.float64)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed: int, concepts: int = 2, span: int = D) -> tuple[list[Concept], list[Tensor]]:
    """Concepts apart from their targets and the kept prompts by their means, in ``span`` dimensions of uneven use."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(normal(generator, D, span)).Q.T * torch.logspace(0, -1, span).double()[:, None]
    mean = 3 * normal(generator, 1, span)

    def prompt() -> Tensor:
        return (mean + normal(generator, T, span)) @ basis

    given = [Concept(prompt() + normal(generator, 1, span) @ basis, prompt(), 4, 3) for _ in range(concepts)]
    return given, [prompt() for _ in range(5)]


def labelled(concepts: list[Concept], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All tokens with shape (n, d), and labels with shape (n, k)."""
    tokens, labels = [], []
    for index, concept in enumerate(concepts):
        tokens += [concept.tokens, concept.target]
        labels += [index] * T + [-1] * T
    labels += [-1] * sum(map(len, kept))
    return torch.cat([*tokens, *kept]), torch.stack(
        [torch.tensor(labels) == k for k in range(len(concepts))], 1
    ).double()


def cross_covariance(x: Tensor, z: Tensor) -> Tensor:
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


def explained(x: Tensor, z: Tensor) -> float:
    """R² of the best linear probe with an intercept: 0 is a constant's."""
    design = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    fitted = design @ torch.linalg.lstsq(design, z, rcond=1e-9, driver="gelsd").solution
    return 1 - float((z - fitted).square().sum() / (z - z.mean(0)).square().sum())


def root(m: Tensor) -> tuple[Tensor, Tensor]:
    """``Mʰ`` and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(m)
    values = values * (values > 1e-10 * values.max())
    inverse = torch.where(values > 0, values.clamp(min=1e-300).rsqrt(), 0.0)
    return vectors * values.sqrt() @ vectors.T, vectors * inverse @ vectors.T


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4), span=st.sampled_from([8, D]))
def test_no_linear_probe_finds_a_concept_where_one_did(seed: int, concepts: int, span: int) -> None:
    given, kept = problem(seed, concepts, span)
    transform = leace(given, iter(kept))
    x, z = labelled(given, kept)
    moved = transform.on_tokens(x)
    assert explained(x, z) > 0.1
    # Measured over 400 draws: 5.6e-16 at worst.
    assert explained(moved, z) < 1e-12
    # Measured over 400 draws: 8.2e-14 at worst.
    assert cross_covariance(moved, z).norm() < 1e-12 * cross_covariance(x, z).norm()
    # Nor does one that asks whether a token is of any concept.
    assert explained(moved, z.sum(1, keepdim=True)) < 1e-12
    # Shuffled labels were not erased.
    assert explained(moved, z[torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))]) > 1e-3


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4), span=st.sampled_from([8, D]))
def test_is_an_oblique_projection_of_the_right_rank(seed: int, concepts: int, span: int) -> None:
    given, kept = problem(seed, concepts, span)
    transform = leace(given, kept)
    matrix = transform.matrix()
    # Measured over 400 draws: 8.9e-15 at worst.
    torch.testing.assert_close(matrix @ matrix, matrix, rtol=0, atol=1e-12)
    assert transform.factors()[0].shape == (D, concepts)
    assert (matrix - matrix.T).norm() > 1e-3, "it is an orthogonal one"


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4), span=st.sampled_from([8, D]))
def test_equals_the_papers_formula(seed: int, concepts: int, span: int) -> None:
    """``I − W⁺ P W``, with W the pseudo-inverse of M's root and P the orthogonal projection on colsp(W Σ)."""
    given, kept = problem(seed, concepts, span)
    x, z = labelled(given, kept)
    half, whiten = root(x.T @ x / len(x))
    whitened = whiten @ cross_covariance(x, z)
    expected = IDENTITY - half @ whitened @ torch.linalg.pinv(whitened) @ whiten
    # Measured over 400 draws: 3.7e-14 at worst.
    torch.testing.assert_close(leace(given, kept).matrix(), expected, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4))
def test_moves_tokens_no_further_than_any_other_that_erases(seed: int, concepts: int) -> None:
    """First-order optimality in every direction V with V Σ = 0, and the orthogonal projection moves them further."""
    given, kept = problem(seed, concepts)
    x, z = labelled(given, kept)
    cross = cross_covariance(x, z)
    along = cross @ torch.linalg.pinv(cross)
    matrix = leace(given, kept).matrix()

    def distance(matrix: Tensor) -> Tensor:
        return (x @ matrix.T - x).square().sum() / len(x)

    # The gradient's part that keeps V Σ = 0.
    gradient = 2 * (matrix - IDENTITY) @ (x.T @ x / len(x)) @ (IDENTITY - along)
    # Measured over 400 draws: 2.5e-15 at worst.
    assert gradient.norm() < 1e-12 * (x.T @ x / len(x)).norm()
    assert distance(matrix) < distance(IDENTITY - along)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 4))
def test_directions_that_no_token_uses_stay(seed: int, concepts: int) -> None:
    given, kept = problem(seed, concepts, span=6)
    x, _ = labelled(given, kept)
    other = torch.linalg.svd(x)[2][6:]
    # Measured over 400 draws: 1.9e-11 at worst.
    assert (leace(given, kept).on_tokens(other) - other).norm() < 1e-9


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), shift=st.floats(0.1, 3), size=st.integers(1, 9))
def test_in_parts_as_at_once(seed: int, shift: float, size: int) -> None:
    """And one concept is a projection of rank one: ``I − δ δᵀM⁺ / δᵀM⁺δ``, δ from the rest's mean to the concept's."""
    generator = torch.Generator().manual_seed(seed)
    erased, rest = normal(generator, 30, D) + shift, normal(generator, 50, D)
    fitter = LeaceFitter(D, 1)
    for part in erased.split(size):
        fitter.update(part, 0)
    for part in rest.split(size):
        fitter.update(part, None)
    x = torch.cat([erased, rest])
    delta = (erased.mean(0) - rest.mean(0))[:, None]
    right = torch.linalg.solve(x.T @ x, delta).T
    expected = IDENTITY - delta @ right / (right @ delta)
    torch.testing.assert_close(fitter.fit().matrix(), expected, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    concepts=st.integers(1, 5),
    prompts=st.integers(0, 3),
    positions=st.integers(1, 5),
)
def test_any_number_of_anything(seed: int, concepts: int, prompts: int, positions: int) -> None:
    """Fewer tokens than dimensions too: the probe then finds everything, before."""
    generator = torch.Generator().manual_seed(seed)
    given = [
        Concept(normal(generator, positions, D), normal(generator, positions, D), positions, positions)
        for _ in range(concepts)
    ]
    kept = [normal(generator, 3, D) for _ in range(prompts)]
    matrix = leace(given, kept).matrix()
    assert matrix.shape == (D, D)
    torch.testing.assert_close(matrix @ matrix, matrix, rtol=0, atol=1e-9)


def test_a_concept_twice_is_one() -> None:
    """Their classes have one mean: the rank is 1 and the tokens' weights are all that changes."""
    given, kept = problem(0, concepts=1)
    transform = leace([*given, *given], kept)
    assert transform.factors()[0].shape == (D, 1)
    x, z = labelled([*given, *given], kept)
    assert cross_covariance(transform.on_tokens(x), z).norm() < 1e-12


def test_the_rule_says_which_tokens_count() -> None:
    given, kept = problem(1)
    cut = [Concept(*last_subject_pairs(c), 2, 2) for c in given]
    assert torch.equal(leace(given, kept, rule=last_subject_pairs).matrix(), leace(cut, kept).matrix())


@pytest.mark.parametrize("labels", [[], [0], [None]])
def test_without_two_classes_there_is_nothing_to_find(labels: list[int | None]) -> None:
    fitter = LeaceFitter(D, 1)
    for label in labels:
        fitter.update(normal(torch.Generator().manual_seed(0), 20, D), label)
    step = fitter.fit()
    assert Transform((step,), D).factors()[0].shape == (D, 0)
    assert torch.equal(step.matrix(), IDENTITY)


def test_equal_means_are_the_identity() -> None:
    given, kept = problem(2)
    same = [Concept(c.tokens, c.tokens, 4, 4) for c in given[:1]]
    assert torch.equal(leace(same, []).matrix(), IDENTITY)
    assert not torch.equal(leace(same, kept).matrix(), IDENTITY)


def test_refusals() -> None:
    given, kept = problem(3)
    with pytest.raises(UsageError, match="no concept"):
        leace([], kept)
    for bad in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match=r"^tolerance = "):
            leace(given, kept, tolerance=bad)
        with pytest.raises(UsageError, match="correlation_tolerance = "):
            leace(given, kept, correlation_tolerance=bad)
    with pytest.raises(UsageError, match=r"give \(tokens, 12\)"):
        leace(given, [kept[0][:, 1:]])
    with pytest.raises(UsageError, match=r"give \(tokens, 12\)"):
        leace([given[0], Concept(kept[0][:, 1:], kept[0][:, 1:], 2, 2)], kept)
    with pytest.raises(UsageError, match="label = 2: give None or 0 to 1"):
        LeaceFitter(D, 2).update(kept[0], 2)
    with pytest.raises(NumericsError, match="embedding holds inf or nan"):
        leace(given, [kept[0] * float("nan")])
    with pytest.raises(NumericsError, match="inf or nan"):
        leace(given, [kept[0] * 1e200])
