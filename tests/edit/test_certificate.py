"""The best attack of bounded norm: optimality conditions, another solver, and what no embedding can do better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from excise.edit import certificate
from excise.edit.certificate import Margin, certify, certify_normal, certify_weights
from excise.edit.gram import gram
from excise.edit.rece import rece
from excise.edit.tokens import Concept, all_pairs
from excise.edit.transform import Step, Transform
from excise.edit.trust_region import Spectrum, trust_region
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
    """Weights, an edit, and the tokens that it erases."""
    weights, concepts, kept = problem(seed)
    scales = Scales(keep=0.01, ridge=1e-3)
    transform = uce(weights, concepts, kept, scales=scales, technique=technique, rule=all_pairs)
    return weights, transform, torch.cat([concept.tokens for concept in concepts])


def stacked(weights: list[Tensor], transform: Transform, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """All ``W_i T_i`` as one matrix, and all ``W_i c`` as one row for each token."""
    edited = torch.cat([transform.on_weight(weight, site) for site, weight in enumerate(weights)])
    return edited, torch.cat([tokens @ weight.T for weight in weights], dim=1)


def errors(matrix: Tensor, aims: Tensor, points: Tensor) -> Tensor:
    """The definition, for ``points`` (n, k, d)."""
    return (points @ matrix.T - aims[:, None]).square().sum(dim=2) / aims.square().sum(dim=1, keepdim=True)


def radii_of(tokens: Tensor) -> Tensor:
    return tokens.norm(dim=1, keepdim=True) * tokens.new_tensor(RADII)


def by_programming(matrix: Tensor, aim: Tensor, radius: float) -> Tensor:
    """One solution by SLSQP, which sees neither A nor b, in units in which the radius and the concept's size are 1."""
    scaled, aims = (matrix * radius / aim.norm()).numpy(), (aim / aim.norm()).numpy()

    def value(point: Any) -> tuple[float, Any]:
        missed = scaled @ point - aims
        return missed @ missed, 2 * scaled.T @ missed

    ball: Any = {"type": "ineq", "fun": lambda point: 1 - point @ point, "jac": lambda point: -2 * point}
    found = minimize(value, np.zeros(D), jac=True, method="SLSQP", constraints=ball, options={"ftol": 1e-15})
    return radius * torch.tensor(found.x)


def generic(matrix: Tensor, aims: Tensor, tokens: Tensor) -> Tensor:
    """Its errors for all tokens and radii, with shape (n, k)."""
    pairs = zip(aims, radii_of(tokens), strict=True)
    found = [torch.stack([by_programming(matrix, aim, float(r)) for r in radii]) for aim, radii in pairs]
    return errors(matrix, aims, torch.stack(found))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_the_concept_is_there_before_the_edit_and_not_after(seed: int) -> None:
    weights, concepts, kept = problem(seed)
    tokens, total = concepts[0].tokens, gram(weights)
    # Measured over 2000 draws: 1.7e-29 at worst.
    assert certify(total, IDENTITY, tokens).errors.max() < 1e-26
    transform = uce(weights, concepts, kept, scales=Scales(100, keep=0.01, ridge=0.01), rule=all_pairs).matrix()
    # From 0.015 up over 2000 draws. T is regular: twice the norm may be enough to bring everything back.
    assert certify(total, transform, tokens).total[0] > 1e-3


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_before_the_edit_where_the_weights_have_a_null_space(seed: int) -> None:
    weights, concepts, _ = problem(seed, (5, 4))
    untouched = certify(gram(weights), IDENTITY, concepts[0].tokens, radii=(0.5, 1.0, 4.0))
    # Measured over 2000 draws: 1.3e-15 at worst, which G's own rounding makes of its null space.
    assert untouched.errors[:, 1:].max() < 1e-13
    # The token's part in the row space: shorter than the token, and all of it.
    rows = torch.linalg.svd(torch.cat(weights), full_matrices=False)[2]
    expected = concepts[0].tokens @ rows.T @ rows
    assert (untouched.adversaries()[:, 1:] - expected[:, None]).norm() < 1e-10 * expected.norm()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), technique=st.sampled_from(["replace", "tensor"]))
def test_no_embedding_in_the_ball_is_better(seed: int, technique: Technique) -> None:
    weights, transform, tokens = edit(seed, technique)
    margin = certify_weights(weights, transform, tokens, radii=RADII)
    adversaries, radius = margin.adversaries(), radii_of(tokens)
    matrix, aims = stacked(weights, transform, tokens)
    assert bool((adversaries.norm(dim=2) <= radius * (1 + 1e-15)).all())
    # Measured over 500 draws: 2.4e-13 at worst, of the expanded square of technique tensor.
    torch.testing.assert_close(errors(matrix, aims, adversaries), margin.errors, rtol=0, atol=1e-12)
    lowest = margin.errors - margin.gaps - 1e-12
    # Anywhere on the sphere, and closer and closer to the optimum.
    for trial in range(30):
        away = normal(seed + 100 + trial, *adversaries.shape)
        found = away if trial < 10 else adversaries + 10.0 ** ((10 - trial) / 4) * away
        shrink = (radius / found.norm(dim=2))[..., None]
        found = found * (shrink if trial < 10 else shrink.clamp(max=1))
        assert bool((errors(matrix, aims, found) >= lowest).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), technique=st.sampled_from(["replace", "tensor"]))
def test_falls_with_the_radius_to_the_unbounded_residual(seed: int, technique: Technique) -> None:
    weights, transform, tokens = edit(seed, technique)
    radii = (0.01, 0.1, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 1e3, 1e6)
    margin = certify_weights(weights, transform, tokens, radii=radii)
    matrix, aims = stacked(weights, transform, tokens)
    solution: Tensor = torch.linalg.lstsq(matrix, aims.T, driver="gelsd").solution
    unbounded = (matrix @ solution - aims.T).square().sum(dim=0) / aims.square().sum(dim=1)
    assert bool((margin.errors.diff(dim=1, prepend=torch.ones(2 * T, 1)) <= 1e-13).all())
    # Measured over 500 draws: 6.3e-13 at worst, where c' has some hundred times the norm.
    assert bool((margin.errors >= unbounded[:, None] - 1e-11).all())
    torch.testing.assert_close(margin.errors[:, -1], unbounded, rtol=0, atol=1e-11)
    # It is far from there within the concept's own norm.
    assert bool((margin.errors[:, 3] > unbounded + 1e-6).any())
    assert not margin.multipliers[:, -1].any()
    assert margin.total == pytest.approx(np.average(margin.errors, axis=0, weights=margin.sizes), rel=1e-12)
    assert torch.equal(margin.worst, margin.errors.min(dim=0).values)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, D), st.floats(0, 6), st.floats(-30, 30), st.booleans())
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
    assert bool(((mu * radius >= -1e-13 * size) & (mu * (radius - norms) <= 1e-13 * size)).all())
    if rank < D and decades < 3 and not outside:
        # Of least norm where the null space stands out: nothing in it where the bound doesn't bind.
        free = (points @ basis[:, rank:]).norm(dim=2)[norms < 0.999 * radius]
        assert bool((free <= 1e-9 * radius.max()).all())


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_agrees_with_a_generic_solver(technique: Technique) -> None:
    weights, transform, tokens = edit(4, technique)
    margin = certify_weights(weights, transform, tokens, radii=RADII)
    # Measured: 2e-16 and, of technique tensor's expanded square, 2e-14 at worst.
    torch.testing.assert_close(margin.errors, generic(*stacked(weights, transform, tokens), tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [2, 4, 6, 8])
def test_agrees_when_ill_conditioned(exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A has the square of the condition number, up to 10¹⁶ here; within 4 times a token's norm that costs nothing."""
    weights, _, tokens = edit(2)
    left, _, right = torch.linalg.svd(normal(9, D, D))
    transform = Transform((Step.of(left * torch.logspace(0, -exponent, D, dtype=torch.float64) @ right),), D)
    expected = generic(*stacked(weights, transform, tokens), tokens)
    # Newton needs no more.
    monkeypatch.setattr("excise.edit.trust_region._ITERATIONS", 11)
    margin = certify_weights(weights, transform, tokens, radii=RADII)
    # Measured: 1.1e-13 at worst on several processors, of which either solver may be the cause; gaps of up to 2.8e-14.
    torch.testing.assert_close(margin.errors, expected, rtol=0, atol=1e-12)
    assert margin.gaps.max() < 1e-12
    # The gap holds for any point of the ball, however it was found.
    solve, place = Spectrum.multipliers, Spectrum.points
    for factor, away in ((1.5, 0.0), (1.0, 0.1), (1.5, 0.1)):
        monkeypatch.setattr(Spectrum, "multipliers", lambda *given, by=factor: by * solve(*given))
        monkeypatch.setattr(Spectrum, "points", lambda *given, by=away: (1 - by) * place(*given))
        poor = certify_weights(weights, transform, tokens, radii=RADII)
        assert poor.errors.mean() > expected.mean() + 1e-4
        assert bool((poor.errors - poor.gaps <= expected).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_an_epoch_of_rece_raises_it(seed: int) -> None:
    weights, concepts, kept = problem(seed)
    result = rece(weights, concepts, kept, uce_scales=Scales(keep=1, ridge=0.5), epochs=2, ridge=0.1, anchor="original")
    total, tokens = gram(weights), torch.cat([concept.tokens for concept in concepts])
    before = certify(total, result.uce.matrix(), tokens).total
    for epoch in result.epochs:
        assert bool((certify(total, epoch.transform.matrix(), tokens).total > before).all())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), weight_scale=st.floats(-20, 20), token_scale=st.floats(-20, 20))
def test_basis_and_scale_do_not_matter(seed: int, weight_scale: float, token_scale: float) -> None:
    weights, transform, tokens = edit(seed)
    basis, _ = torch.linalg.qr(normal(seed + 7, D, D))
    total, matrix = gram(weights), transform.matrix()
    margin = certify(total, matrix, tokens, radii=RADII)
    total, matrix = (basis @ part @ basis.T for part in (10**weight_scale * total, matrix))
    turned = certify(total, matrix, 10**token_scale * tokens @ basis.T, radii=RADII)
    # Measured over 300 draws: 1.1e-15 and 1.8e-10 at worst.
    torch.testing.assert_close(turned.errors, margin.errors, rtol=0, atol=1e-13)
    moved = margin.adversaries() @ basis.T * 10**token_scale
    assert (turned.adversaries() - moved).norm() < 1e-7 * moved.norm()


def test_three_ways_to_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, transform, tokens = edit(5)
    shared = certify(gram(weights), transform.matrix(), tokens, radii=RADII)
    assert torch.equal(certify_weights(weights, transform, tokens, radii=RADII).errors, shared.errors)
    # The same edit, said site by site: scalars of zero.
    zeros = Step(IDENTITY, IDENTITY[None], torch.zeros(len(weights), 1, dtype=torch.float64))
    apart = certify_weights(weights, transform.then(zeros), tokens, radii=RADII)
    matrix, aims = stacked(weights, transform, tokens)
    equations = matrix.T @ matrix, aims @ matrix
    bare = certify_normal(*equations, aims.square().sum(dim=1), tokens, radii=RADII)
    for margin in (apart, bare):
        torch.testing.assert_close(margin.errors, shared.errors, rtol=0, atol=1e-13)
        torch.testing.assert_close(margin.sizes, shared.sizes, rtol=1e-13, atol=0)
        torch.testing.assert_close(margin.multipliers, shared.multipliers, rtol=1e-8, atol=1e-10)
    assert torch.equal(bare.adversaries(), trust_region(*equations, radii_of(tokens)))
    monkeypatch.setattr(certificate, "_BLOCK", 3 * len(RADII) * D)
    blocks = certify(gram(weights), transform.matrix(), tokens, radii=RADII)
    torch.testing.assert_close(blocks.errors, shared.errors, rtol=0, atol=1e-14)
    part, alone = shared.part(slice(3, 7)), certify(gram(weights), transform.matrix(), tokens[3:7], radii=RADII)
    for ours, theirs in ((part.errors, alone.errors), (part.total, alone.total), (part.sizes, alone.sizes)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(part.adversaries(), shared.adversaries()[3:7], rtol=1e-10, atol=1e-12)
    # Untouched, the expanded square leaves rounding error, and never less than nothing.
    untouched = certify_weights(weights, Transform((zeros,), D), tokens).errors
    assert bool(((untouched >= 0) & (untouched < 1e-14)).all())


def test_nothing_to_regenerate_and_nothing_to_do_it_with() -> None:
    weights = problem(7, (5, 4))[0]
    total = gram(weights)
    deaf = torch.linalg.svd(torch.cat(weights))[2][-1]
    tokens = torch.stack([normal(1, D), torch.zeros(D, dtype=torch.float64), deaf])

    def check(margin: Margin, expected: list[Any]) -> None:
        assert margin.errors.T.tolist() == [expected] * 3
        assert margin.total.tolist() == margin.worst.tolist() == margin.errors[0].tolist()
        assert margin.sizes.count_nonzero() == 1
        assert not margin.adversaries()[1].any()

    check(certify(total, 0 * IDENTITY, tokens), [1, 0, 0])
    # b = 0 and A ≠ 0: the one direction that is left is orthogonal to the concept.
    direction = normal(2, D)
    direction -= (direction @ total @ tokens[0]) / (tokens[0] @ total @ tokens[0]) * tokens[0]
    away = torch.outer(direction, IDENTITY[0])
    check(certify(total, away, tokens), [pytest.approx(1, abs=1e-15), 0, 0])
    assert certify(total, away, tokens).adversaries()[0].norm() < 1e-12
    for silent in (tokens[:0], tokens[1:]):
        margin = certify(total, IDENTITY, silent)
        assert margin.total.tolist() == margin.worst.tolist() == [0, 0, 0]
    # A = 0 and b ≠ 0 is no certificate's, but has an answer: as far along b as the ball goes.
    radius = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    points = trust_region(0 * IDENTITY, tokens[:1], radius)
    torch.testing.assert_close(points[0], radius[0, :, None] * tokens[:1] / tokens[0].norm(), rtol=1e-14, atol=0)
    assert not trust_region(IDENTITY, tokens[:1], radius)[0, 0].any()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    token = normal(0, 1, D)
    one = token[:, :1].abs()
    refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (UsageError, "a gram of shape", lambda: certify(IDENTITY[1:], IDENTITY, token)),
        (UsageError, r"give \(tokens, 16\)", lambda: certify(IDENTITY, IDENTITY, token[:, 1:])),
        (UsageError, "width 16 for an edit of", lambda: certify_weights([IDENTITY], Transform((), 15), token)),
        (UsageError, "1 tokens and sizes of", lambda: certify_normal(IDENTITY, token, token[0], token)),
        (UsageError, "a system of shapes", lambda: trust_region(IDENTITY, token[0], one)),
        (UsageError, "an eigenvalue of -1", lambda: trust_region(-IDENTITY, token, one)),
        (UsageError, "radii of shape", lambda: trust_region(IDENTITY, token, one[0])),
        (UsageError, "negative or not finite", lambda: trust_region(IDENTITY, token, -one)),
        (UsageError, "negative or not finite", lambda: trust_region(IDENTITY, token, one / 0)),
        (NumericsError, "weights hold inf or nan", lambda: certify(IDENTITY, IDENTITY / 0, token)),
        (NumericsError, "side holds inf or nan", lambda: trust_region(IDENTITY, token / 0, one)),
    ]
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
    for radii in ((), (0.0,), (1.0, -1.0), (float("inf"),), (float("nan"),)):
        with pytest.raises(UsageError, match=r"radii = \(.*give one or more positive"):
            certify(IDENTITY, IDENTITY, token, radii=radii)
    monkeypatch.setattr("excise.edit.trust_region._ITERATIONS", 1)
    with pytest.raises(NumericsError, match="isn't solved after 1 iterations"):
        trust_region(torch.diag(torch.arange(D).double()), token, 0.1 * one)
