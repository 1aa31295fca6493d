"""Streamed statistics give what all tokens at once give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from excise.edit.fitter import Fitter, Scales, orthogonal_to
from excise.errors import NumericsError, UsageError

D = 12
SCALES = Scales(0.7, keep=0.3, ridge=0.2)


def normal(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(tokens: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    """UCE, eq. 3, from the rows."""
    s = (
        SCALES.erase * tokens.T @ tokens
        + SCALES.keep * kept.T @ kept
        + SCALES.ridge * torch.eye(D, dtype=torch.float64)
    )
    change = SCALES.erase * (targets - tokens).T @ tokens
    right: Tensor = torch.linalg.solve(s, change.T)
    return torch.eye(D, dtype=torch.float64) + right.T


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(0, 30), cut=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_in_parts_as_at_once(rows: int, cut: int, seed: int) -> None:
    """Either side of the number of rows where they are folded into a product."""
    tokens, targets, kept = normal(rows, seed), normal(rows, seed + 1), normal(9, seed + 2)
    fitter = Fitter(D).keep(kept[:4]).erase(tokens[:cut], targets[:cut])
    fitter.keep_all(iter([kept[4:]])).erase(tokens[cut:], targets[cut:])
    # Measured over 400 draws: 6.2e-15 at worst.
    torch.testing.assert_close(fitter.fit(SCALES).matrix(), explicit(tokens, targets, kept), rtol=0, atol=1e-13)


def test_memory_is_the_same_for_any_number_of_prompts() -> None:
    def held(fitter: Fitter) -> int:
        parts = [fitter._kept, *(fitter._folded or ()), *(part for pair in fitter._pairs for part in pair)]
        assert not fitter._scaled
        return sum(part.numel() for part in parts)

    fitter = Fitter(D)
    most = 0
    for prompt in range(200):
        fitter.erase(normal(4, prompt), normal(4, prompt + 1)).keep(normal(4, prompt + 2))
        most = max(most, held(fitter))
    assert most <= 4 * D * D


def test_a_step_stays_and_a_copy_is_apart() -> None:
    fitter = Fitter(D).erase(normal(3, 0), normal(3, 1))
    step = fitter.fit(SCALES)
    before, copy = step.matrix().clone(), fitter.copy()
    fitter.erase(normal(20, 2), normal(20, 3)).keep(normal(3, 4))
    assert torch.equal(step.matrix(), before)
    assert torch.equal(copy.fit(SCALES).matrix(), before)
    assert not torch.allclose(fitter.fit(SCALES).matrix(), before)
    folded = fitter.copy()
    after = fitter.fit(SCALES).matrix()
    folded.erase(normal(3, 5), normal(3, 6))
    assert torch.equal(fitter.fit(SCALES).matrix(), after)


def test_nothing_to_erase_is_the_identity() -> None:
    assert torch.equal(Fitter(D).keep(normal(4, 0)).fit(SCALES).matrix(), torch.eye(D, dtype=torch.float64))


@pytest.mark.parametrize("rows", [3, 20])
def test_scalars_make_a_step_for_each_site(rows: int) -> None:
    """Aiming at c* − α c is erasing towards that target."""
    tokens, targets, kept = normal(rows, 0), normal(rows, 1), normal(4, 2)
    alphas = torch.tensor([0.0, 0.4, -1.5], dtype=torch.float64)
    step = Fitter(D).keep(kept).erase(tokens, targets, alphas).fit(SCALES)
    for site, alpha in enumerate(alphas):
        expected = explicit(tokens, targets - alpha * tokens, kept)
        torch.testing.assert_close(step.matrix(site), expected, rtol=0, atol=1e-12)


def test_refusals() -> None:
    fitter = Fitter(D)
    with pytest.raises(UsageError, match="3 tokens to erase and 2 targets"):
        fitter.erase(normal(3, 0), normal(2, 0))
    with pytest.raises(UsageError, match=r"embeddings of shape \(12,\)"):
        fitter.keep(normal(1, 0)[0])
    with pytest.raises(NumericsError, match="inf or nan"):
        fitter.erase(normal(3, 0), normal(3, 0) / 0)
    fitter.erase(normal(3, 0), normal(3, 1), torch.ones(2))
    with pytest.raises(UsageError, match="give one for each of 2 weights"):
        fitter.erase(normal(3, 0), normal(3, 1), torch.ones(3))
    with pytest.raises(UsageError, match="dim = 0"):
        Fitter(0)
    with pytest.raises(NumericsError, match="singular to working precision with ridge = 0"):
        Fitter(D).erase(normal(3, 0), normal(3, 1)).fit(Scales(keep=1, ridge=0))
    with pytest.raises(NumericsError, match="inf or nan"):
        Fitter(D).erase(1e200 * normal(3, 0), normal(3, 1)).fit(SCALES)


def test_moments_stand_for_rows() -> None:
    tokens, targets, more, aims = (normal(9, seed) for seed in (20, 21, 22, 23))
    by_rows = Fitter(D).erase(tokens, targets).erase(more, aims).keep(more).fit(SCALES).matrix()
    fitter = Fitter(D).erase(tokens, targets).erase_moments(more.T @ more, aims.T @ more).keep_gram(more.T @ more)
    torch.testing.assert_close(fitter.fit(SCALES).matrix(), by_rows, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [3, 9])
def test_what_is_held_is_a_constraint(rows: int) -> None:
    """Equality-constrained least squares by its KKT system, an independent solve."""
    tokens, targets, kept, held = normal(rows, 0), normal(rows, 1), normal(4, 2), normal(5, 3)
    held = torch.cat([held, held[:2] * 3])  # dependent rows
    eye = torch.eye(D, dtype=torch.float64)
    s = SCALES.erase * tokens.T @ tokens + SCALES.keep * kept.T @ kept + SCALES.ridge * eye
    aim = SCALES.erase * tokens.T @ (targets - tokens)
    free = held[:5]
    kkt = torch.cat([torch.cat([s, free.T], 1), torch.cat([free, torch.zeros(5, 5, dtype=torch.float64)], 1)])
    expected = torch.linalg.solve(kkt, torch.cat([aim, torch.zeros(5, D, dtype=torch.float64)]))[:D].T + eye
    fitter = Fitter(D).erase(tokens, targets).keep(kept)
    assert (held @ fitter.fit(SCALES).matrix().T - held).norm() > 0.1
    step = fitter.hold(held).fit(SCALES).matrix()
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-12)
    assert (held @ step.T - held).norm() < 1e-13 * held.norm()
    with pytest.raises(UsageError, match="span all 12"):
        fitter.hold(normal(D, 4))


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(1, D - 1), rows=st.integers(D, 200), seed=st.integers(0, 10**6))
def test_the_rounding_of_float32_is_not_held(rank: int, rows: int, seed: int) -> None:
    """Tokens of low rank as a text encoder gives them: to the last bit of float64 they span everything."""
    exact = normal(rows, seed)[:, :rank] @ normal(D, seed + 1)[:rank]
    rounded = exact.float().double()
    if rank > 1:
        assert int(torch.linalg.matrix_rank(rounded)) == D
    free = orthogonal_to(rounded)
    assert free.shape == (D, D - rank)
    assert (exact @ free).norm() < 1e-6 * exact.norm()
    step = Fitter(D).erase(normal(3, seed + 2), normal(3, seed + 3)).hold(rounded).fit(SCALES).matrix()
    assert (exact @ step.T - exact).norm() < 1e-5 * exact.norm()
    # A direction that is used by more than rounding is held.
    faint = normal(1, seed + 4) @ free @ free.T
    held = torch.cat([rounded, 1e-4 * rounded.norm() * faint / faint.norm()])
    if rank < D - 1:
        assert orthogonal_to(held).shape == (D, D - rank - 1)
        assert (faint @ orthogonal_to(held)).norm() < 1e-2 * faint.norm()
