"""The best attack of bounded norm: optimality conditions, two other solvers, and what no embedding can do better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from torch import Tensor

from excise.edit import certificate
from excise.edit.certificate import Margin, certify, certify_normal, certify_weights, trust_region
from excise.edit.gram import gram
from excise.edit.rece import rece
from excise.edit.tokens import Concept, all_pairs
from excise.edit.transform import Step, Transform
from excise.edit.uce import Scales, Technique, uce
from excise.errors import NumericsError, UsageError

D, T = 16, 5
RADII = (0.3, 1.0, 2.0, 4.0)
IDENTITY = torch.eye(D, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, heights: tuple[int, ...] = (6, 20, 9)) -> tuple[list[Tensor], list[Concept], list[Tensor]]:
    """Weights, two concepts and a kept prompt."""
    weights = [normal(seed + 11 * o, o, D) for o in heights]
    concepts = [Concept(normal(seed + i, T, D), normal(seed + 5 + i, T, D), 3, 2) for i in (1, 2)]
    return weights, concepts, [normal(seed + 3, T, D)]


def edit(seed: int, technique: Technique = "replace") -> tuple[list[Tensor], Transform, Tensor]:
    """Weights, an edit with a singular value near 10⁻⁴, and the tokens that it erases."""
    weights, concepts, kept = problem(seed)
    scales = Scales(keep=0.01, ridge=1e-3)
    transform = uce(weights, concepts, kept, scales=scales, technique=technique, rule=all_pairs)
    return weights, transform, torch.cat([concept.tokens for concept in concepts])


def errors(weights: list[Tensor], transform: Transform, points: Tensor, tokens: Tensor) -> Tensor:
    """The definition, layer by layer, for ``points`` (n, k, d)."""
    missed, sizes = torch.zeros(points.shape[:2], dtype=torch.float64), torch.zeros(len(tokens), dtype=torch.float64)
    for site, weight in enumerate(weights):
        aim = tokens @ weight.T
        missed += (points @ transform.on_weight(weight, site).T - aim[:, None]).square().sum(dim=2)
        sizes += aim.square().sum(dim=1)
    return missed / sizes[:, None]


def stacked(weights: list[Tensor], transform: Transform, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """All ``W_i T_i`` as one matrix, and all ``W_i c`` as one row for each token."""
    edited = torch.cat([transform.on_weight(weight, site) for site, weight in enumerate(weights)])
    return edited, torch.cat([tokens @ weight.T for weight in weights], dim=1)


def by_singular_values(matrix: Tensor, aim: Tensor, radius: float) -> Tensor:
    """One token's solution without A: the condition number isn't squared, and brentq finds the root."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    along = values * (left.T @ aim)

    def point(mu: float) -> Tensor:
        return along / (values.square() + mu)

    if float(point(0).norm()) <= radius:
        return right.T @ point(0)
    most = float(along.norm()) / radius
    root: Any = brentq(lambda mu: 1 - radius / float(point(mu).norm()), 0, most, xtol=1e-300, rtol=1e-15, maxiter=1000)
    return right.T @ point(root)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), full_rank=st.booleans())
def test_the_concept_is_there_before_the_edit_and_not_after(seed: int, full_rank: bool) -> None:
    weights, concepts, kept = problem(seed, (6, 20, 9) if full_rank else (5, 4))
    tokens, total = concepts[0].tokens, gram(weights)
    untouched = certify(total, IDENTITY, tokens)
    # Measured over 2000 draws: 3e-24 at full rank; 1.3e-30 without.
    assert untouched.errors.max() < 1e-20
    assert untouched.total.max() < 1e-20
    # In half the norm it isn't all there: at least the (1 − r)² of a token along the weakest direction... of G = I.
    assert certify(IDENTITY, IDENTITY, tokens, radii=[0.5]).errors == pytest.approx(0.25, rel=1e-12)
    transform = uce(weights, concepts, kept, scales=Scales(100, keep=0.01, ridge=0.01), rule=all_pairs).matrix()
    if full_rank:
        assert certify(total, transform, tokens).total.min() > 1e-3


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), technique=st.sampled_from(["replace", "tensor"]))
def test_no_embedding_in_the_ball_is_better(seed: int, technique: Technique) -> None:
    weights, transform, tokens = edit(seed, technique)
    margin = certify_weights(weights, transform, tokens, radii=RADII)
    adversaries, radius = margin.adversaries(), tokens.norm(dim=1)[:, None] * torch.tensor(RADII)
    assert bool((adversaries.norm(dim=2) <= radius * (1 + 1e-14)).all())
    torch.testing.assert_close(errors(weights, transform, adversaries, tokens), margin.errors, rtol=1e-10, atol=1e-13)
    lowest = margin.errors - margin.gaps - 1e-13
    # Anywhere in the ball, and close to the optimum.
    for trial in range(40):
        away = normal(seed + 100 + trial, *adversaries.shape)
        found = away if trial < 20 else adversaries + 10.0 ** (-trial / 4) * away
        size = found.norm(dim=2, keepdim=True)
        found = found * (radius[..., None] / size).clamp(max=1) if trial >= 20 else found / size * radius[..., None]
        assert bool((errors(weights, transform, found, tokens) >= lowest).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), technique=st.sampled_from(["replace", "tensor"]))
def test_falls_with_the_radius_to_the_unbounded_residual(seed: int, technique: Technique) -> None:
    weights, transform, tokens = edit(seed, technique)
    radii = (0.01, 0.1, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 1e3, 1e6)
    margin = certify_weights(weights, transform, tokens, radii=radii)
    matrix, aims = stacked(weights, transform, tokens)
    solution: Tensor = torch.linalg.lstsq(matrix, aims.T, driver="gelsd").solution
    unbounded = (matrix @ solution - aims.T).square().sum(dim=0) / aims.square().sum(dim=1)
    assert bool((margin.errors.diff(dim=1) <= 1e-13).all())
    assert bool((margin.errors <= 1 + 1e-15).all())
    assert bool((margin.errors >= unbounded[:, None] - 1e-13).all())
    # It is far from there within the concept's own norm.
    assert bool((margin.errors[:, 3] > unbounded + 1e-6).any())
    assert bool((margin.multipliers[:, -1] == 0).all())
    torch.testing.assert_close(margin.errors[:, -1], unbounded, rtol=0, atol=1e-10)
    assert margin.total == pytest.approx(np.average(margin.errors, axis=0, weights=margin.sizes), rel=1e-12)
    assert torch.equal(margin.worst, margin.errors.min(dim=0).values)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(0, D),
    decades=st.floats(0, 6),
    scale=st.floats(-30, 30),
    outside=st.booleans(),
)
def test_optimality_conditions(seed: int, rank: int, decades: float, scale: float, outside: bool) -> None:
    """Moré and Sorensen's theorem: for A ⪰ 0 they are sufficient."""
    basis, _ = torch.linalg.qr(normal(seed, D, D))
    values = 10 ** (scale - decades * torch.linspace(0, 1, D, dtype=torch.float64)) * (torch.arange(D) < rank)
    matrix = (basis * values) @ basis.T
    right = normal(seed + 1, 3, D) if outside else normal(seed + 1, 3, D) * values.sqrt() @ basis.T
    radius = 10 ** (normal(seed + 2, 3, 4) - 0.5 * scale)
    points = trust_region(matrix, right, radius)
    descent = right[:, None] - points @ matrix
    norms = points.norm(dim=2)
    mu = (descent * points).sum(dim=2) / norms.square().clamp(min=torch.finfo(torch.float64).tiny)
    size = right.norm(dim=1)[:, None] + radius * 10**scale
    assert bool((norms <= radius * (1 + 1e-14)).all())
    assert bool(((descent - mu[..., None] * points).norm(dim=2) <= 1e-13 * size).all())
    assert bool((mu * radius >= -1e-13 * size).all())
    assert bool((mu * (radius - norms) <= 1e-13 * size).all())
    if rank < D and not outside:
        # Of least norm: nothing in the null space where the bound doesn't bind.
        free = (points @ basis[:, rank:]).norm(dim=2)[norms < 0.999 * radius]
        assert bool((free <= 1e-9 * radius.max()).all())


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_agrees_with_a_generic_solver(technique: Technique) -> None:
    weights, transform, tokens = edit(4, technique)
    margin = certify_weights(weights, transform, tokens, radii=RADII)
    matrix, aims = (part.numpy() for part in stacked(weights, transform, tokens))
    for token in range(3):
        size = np.square(aims[token]).sum()
        for index, multiple in enumerate(RADII):
            radius = multiple * float(tokens[token].norm())
            found = minimize(
                lambda u, r, aim, size: (
                    np.square(r * matrix @ u - aim).sum() / size,
                    2 * r * matrix.T @ (r * matrix @ u - aim) / size,
                ),
                np.zeros(D),
                args=(radius, aims[token], size),
                jac=True,
                method="SLSQP",
                constraints={"type": "ineq", "fun": lambda u, *_: 1 - u @ u, "jac": lambda u, *_: -2 * u},
                options={"maxiter": 2000, "ftol": 1e-15},
            )
            assert float(margin.errors[token, index]) == pytest.approx(found.fun, abs=1e-9)


@pytest.mark.parametrize("exponent", [2, 4, 6, 8])
def test_agrees_with_singular_values_when_ill_conditioned(exponent: int) -> None:
    """A has the square of the condition number, up to 10¹⁶ here; within 4 times a token's norm that costs nothing."""
    weights, _, tokens = edit(2)
    left, _, right = torch.linalg.svd(normal(9, D, D))
    transform = Transform((Step.of(left * torch.logspace(0, -exponent, D, dtype=torch.float64) @ right),), D)
    margin = certify_weights(weights, transform, tokens, radii=RADII)
    matrix, aims = stacked(weights, transform, tokens)
    best = torch.stack(
        [
            torch.stack([by_singular_values(matrix, aim, r * float(token.norm())) for r in RADII])
            for aim, token in zip(aims, tokens, strict=True)
        ]
    )
    expected = errors(weights, transform, best, tokens)
    torch.testing.assert_close(margin.errors, expected, rtol=0, atol=1e-13)
    assert bool((margin.errors - margin.gaps <= expected + 1e-14).all())
    assert margin.gaps.max() < 1e-12


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_an_epoch_of_rece_raises_it(seed: int) -> None:
    weights, concepts, kept = problem(seed)
    result = rece(weights, concepts, kept, uce_scales=Scales(keep=1, ridge=0.5), epochs=2, ridge=0.1, anchor="original")
    total, tokens = gram(weights), torch.cat([concept.tokens for concept in concepts])
    before = certify(total, result.uce.matrix(), tokens).total
    first = certify(total, result.epochs[0].transform.matrix(), tokens).total
    second = certify(total, result.epochs[1].transform.matrix(), tokens).total
    assert bool((first > before).all())
    assert bool((second > before).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), weight_scale=st.floats(-20, 20), token_scale=st.floats(-20, 20))
def test_basis_and_scale_do_not_matter(seed: int, weight_scale: float, token_scale: float) -> None:
    weights, transform, tokens = edit(seed)
    basis, _ = torch.linalg.qr(normal(seed + 7, D, D))
    total, matrix = gram(weights), transform.matrix()
    margin = certify(total, matrix, tokens, radii=RADII)
    turned = certify(
        10**weight_scale * basis @ total @ basis.T,
        basis @ matrix @ basis.T,
        10**token_scale * tokens @ basis.T,
        radii=RADII,
    )
    torch.testing.assert_close(turned.errors, margin.errors, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.gaps, margin.gaps, rtol=0, atol=1e-11)
    moved = margin.adversaries() @ basis.T * 10**token_scale
    assert (turned.adversaries() - moved).norm() < 1e-5 * moved.norm()


def test_three_ways_to_say_it() -> None:
    weights, transform, tokens = edit(5)
    shared = certify(gram(weights), transform.matrix(), tokens, radii=RADII)
    assert torch.equal(certify_weights(weights, transform, tokens, radii=RADII).errors, shared.errors)
    # The same edit, said site by site: scalars of zero.
    zeros = Step(IDENTITY, IDENTITY[None], torch.zeros(len(weights), 1, dtype=torch.float64))
    apart = certify_weights(weights, transform.then(zeros), tokens, radii=RADII)
    matrix, aims = stacked(weights, transform, tokens)
    equations = matrix.T @ matrix, aims @ matrix, aims.square().sum(dim=1)
    for margin in (apart, certify_normal(*equations, tokens, radii=RADII)):
        torch.testing.assert_close(margin.errors, shared.errors, rtol=0, atol=1e-13)
        torch.testing.assert_close(margin.sizes, shared.sizes, rtol=1e-13, atol=0)
        torch.testing.assert_close(margin.multipliers, shared.multipliers, rtol=1e-8, atol=1e-10)
        radius = tokens.norm(dim=1)[:, None] * torch.tensor(RADII)
        assert torch.equal(margin.adversaries(), trust_region(equations[0], equations[1], radius)) or margin is apart
    # Untouched, the expanded square leaves rounding error, and never less than nothing.
    untouched = certify_weights(weights, Transform((zeros,), D), tokens)
    assert 0 <= untouched.errors.min()
    assert untouched.errors.max() < 1e-14


def test_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, transform, tokens = edit(6)
    whole = certify(gram(weights), transform.matrix(), tokens)
    monkeypatch.setattr(certificate, "_BLOCK", 3 * 3 * D)
    parts = certify(gram(weights), transform.matrix(), tokens)
    torch.testing.assert_close(parts.errors, whole.errors, rtol=0, atol=1e-14)
    torch.testing.assert_close(parts.multipliers, whole.multipliers, rtol=1e-10, atol=1e-12)


def test_nothing_to_regenerate_and_nothing_to_do_it_with() -> None:
    weights = problem(7, (5, 4))[0]
    total = gram(weights)
    deaf = torch.linalg.svd(torch.cat(weights))[2][-1]
    tokens = torch.stack([normal(1, D), torch.zeros(D, dtype=torch.float64), deaf])

    def check(margin: Margin, expected: list[float]) -> None:
        assert margin.errors.T.tolist() == [expected] * 3
        assert margin.total.tolist() == margin.worst.tolist() == [max(expected)] * 3
        assert margin.sizes.count_nonzero() == 1
        assert not margin.adversaries()[1].any()

    # All weights are 0 after the edit, or it hides the token entirely (b = 0, A ≠ 0).
    check(certify(total, 0 * IDENTITY, tokens), [1, 0, 0])
    away = torch.zeros(D, D, dtype=torch.float64)
    away[:, 0] = deaf
    check(certify(total, away, tokens), [1, 0, 0])
    empty = certify(total, IDENTITY, tokens[:0])
    assert empty.total.tolist() == empty.worst.tolist() == [0, 0, 0]
    silent = certify(total, IDENTITY, tokens[1:])
    assert silent.total.tolist() == silent.worst.tolist() == [0, 0, 0]
    # A = 0 and b ≠ 0 is no certificate's, but has an answer: as far along b as the ball goes.
    radius = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    points = trust_region(0 * IDENTITY, tokens[:1], radius)
    torch.testing.assert_close(points[0], radius[0, :, None] * tokens[:1] / tokens[0].norm(), rtol=1e-14, atol=0)
    assert not trust_region(IDENTITY, tokens[:1], radius)[0, 0].any()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    token = normal(0, 1, D)
    for radii in ((), (0.0,), (1.0, -1.0), (float("inf"),), (float("nan"),)):
        with pytest.raises(UsageError, match=r"radii = \(.*give one or more positive"):
            certify(IDENTITY, IDENTITY, token, radii=radii)
    with pytest.raises(UsageError, match="a gram of shape"):
        certify(IDENTITY[1:], IDENTITY, token)
    with pytest.raises(UsageError, match=r"give \(tokens, 16\)"):
        certify(IDENTITY, IDENTITY, token[:, 1:])
    with pytest.raises(UsageError, match="weights of width 16 for an edit of width 15"):
        certify_weights([IDENTITY], Transform((), 15), token)
    with pytest.raises(UsageError, match="1 tokens and sizes of"):
        certify_normal(IDENTITY, token, token[0], token)
    with pytest.raises(UsageError, match="a system of shapes"):
        trust_region(IDENTITY, token[0], token)
    with pytest.raises(UsageError, match="an eigenvalue of -1"):
        trust_region(-IDENTITY, token, token[:, :1].abs())
    with pytest.raises(UsageError, match="radii of shape"):
        trust_region(IDENTITY, token, token[0].abs())
    for radius in (-1.0, float("inf")):
        with pytest.raises(UsageError, match="negative or not finite"):
            trust_region(IDENTITY, token, torch.tensor([[radius]]))
    with pytest.raises(NumericsError, match="edited weights hold inf or nan"):
        certify(IDENTITY, IDENTITY / 0, token)
    with pytest.raises(NumericsError, match="right-hand side holds inf or nan"):
        trust_region(IDENTITY, token / 0, token[:, :1].abs())
    monkeypatch.setattr(certificate, "_ITERATIONS", 1)
    with pytest.raises(NumericsError, match="isn't solved after 1 iterations"):
        trust_region(torch.diag(torch.arange(D).double()), token, torch.tensor([[0.1]]).double())
