"""A transform as a matrix, on weights, on tokens, and as a LoRA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from excise.edit.transform import Step, Transform
from excise.errors import NumericsError, UsageError

D, SITES = 10, 3


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank_step(generator: torch.Generator, rank: int) -> Step:
    return Step.of(torch.eye(D, dtype=torch.float64) + normal(generator, D, rank) @ normal(generator, rank, D))


def site_step(generator: torch.Generator, terms: int) -> Step:
    return Step(normal(generator, D, D), normal(generator, terms, D, D), normal(generator, SITES, terms))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), kinds=st.lists(st.integers(0, 3), max_size=4), site=st.integers(0, SITES - 1))
def test_weight_token_and_matrix_agree(seed: int, kinds: list[int], site: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    transform, product = Transform((), D), torch.eye(D, dtype=torch.float64)
    for terms in kinds:
        step = site_step(generator, terms) if terms else low_rank_step(generator, 2)
        explicit = step.shared - sum(
            (step.scalars[site, k] * step.scaled[k] for k in range(terms)), torch.zeros(D, D, dtype=torch.float64)
        )
        transform, product = transform.then(step), product @ explicit
    assert transform.is_shared is not any(kinds)
    weight, tokens = normal(generator, 6, D), normal(generator, 2, 5, D)
    assert relative(transform.matrix(site), product) < 1e-13
    assert relative(transform.on_weight(weight, site), weight @ product) < 1e-12
    # W T c = W (T c)
    assert relative(transform.on_tokens(tokens, site) @ weight.T, tokens @ (weight @ product).T) < 1e-12
    collapsed = transform.collapse()
    assert relative(collapsed.matrix(site), product) < 1e-12
    assert collapsed.is_shared is transform.is_shared
    if transform.is_shared:
        assert len(collapsed.steps) == min(len(kinds), 1)
    runs = "".join("x" if terms else "s" for terms in kinds)
    while "ss" in runs:
        runs = runs.replace("ss", "s")
    assert "".join("s" if step.is_shared else "x" for step in collapsed.steps) == runs


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), ranks=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_factors_are_exact_and_no_wider_than_the_rows_used(seed: int, ranks: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    transform = Transform((), D)
    for rank in ranks:
        transform = transform.then(low_rank_step(generator, rank))
    left, right = transform.factors()
    assert left.shape == (D, right.shape[0])
    assert right.shape[0] == min(sum(ranks), D)
    assert relative(left @ right, transform.matrix() - torch.eye(D, dtype=torch.float64)) < 1e-12


def test_identity() -> None:
    identity = Transform((), D)
    weight = torch.randn(4, D)
    assert torch.equal(identity.matrix(2), torch.eye(D, dtype=torch.float64))
    assert torch.equal(identity.on_weight(weight), weight)
    assert torch.equal(identity.on_tokens(weight), weight.double())
    left, right = identity.factors()
    assert (left.shape, right.shape) == ((D, 0), (0, D))
    assert identity.collapse() == identity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    transform = Transform((low_rank_step(generator, 2), low_rank_step(generator, 2)), D)
    weight = normal(generator, 4, D).to(dtype)
    before = weight.clone()
    edited = transform.on_weight(torch.nn.Parameter(weight))
    assert edited.dtype == dtype
    assert not edited.requires_grad
    exact = weight.double() @ transform.matrix()
    # The product in float32 leaves a few of float32's roundings, and one of anything narrower.
    product = 0.0 if dtype == torch.float64 else 2 * torch.finfo(torch.float32).eps
    bound = (0.5 * torch.finfo(dtype).eps + product) * exact.abs().max() + 1e-12
    assert bool(((edited.double() - exact).abs() <= bound).all())
    assert torch.equal(weight, before)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), rank=st.integers(0, 4))
def test_a_low_rank_step_is_its_matrix(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = normal(generator, D, rank), normal(generator, rank, D)
    step = Step.low_rank(left, right)
    torch.testing.assert_close(step.matrix(), torch.eye(D, dtype=torch.float64) + left @ right, rtol=0, atol=1e-13)
    matrix = normal(generator, 7, D)
    for same in (step, Step.of(step.shared)):
        assert relative(same.applied_to(matrix), matrix @ step.shared) < 1e-13
    twice = Transform((step, step), D)
    assert relative(twice.collapse().matrix(), twice.matrix()) < 1e-12


def test_float32_weights_as_exact_as_the_bench_claims() -> None:
    """A step of norm 20 over 300 columns, applied in float32: near float32's own rounding."""
    generator = torch.Generator().manual_seed(1)
    left, right = torch.linalg.qr(normal(generator, 300, 30)).Q, torch.linalg.qr(normal(generator, 300, 30)).Q.T
    transform = Transform((Step.low_rank(20 * left, right),), 300)
    weight = normal(generator, 64, 300).float()
    for site in (0, 1):
        assert relative(transform.on_weight(weight, site).double(), weight.double() @ transform.matrix()) < 5e-7


def test_matrix_leaves_the_steps_alone() -> None:
    transform = Transform((low_rank_step(torch.Generator().manual_seed(0), 2),), D)
    before = transform.matrix().clone()
    transform.factors()
    assert torch.equal(transform.matrix(), before)


def test_refusals() -> None:
    generator = torch.Generator().manual_seed(0)
    transform = Transform((site_step(generator, 1),), D)
    for site in (-1, SITES):
        with pytest.raises(UsageError, match=f"site {site} of an edit of {SITES} sites: give 0 to {SITES - 1}"):
            transform.matrix(site)
    with pytest.raises(UsageError, match=r"a weight of shape \(4, 9\)"):
        transform.on_weight(torch.ones(4, D - 1))
    with pytest.raises(UsageError, match="tokens of width 9"):
        transform.on_tokens(torch.ones(4, D - 1))
    with pytest.raises(UsageError, match="a step for tokens of width 9 in an edit of width 10"):
        transform.then(Step.of(torch.eye(D - 1, dtype=torch.float64)))
    with pytest.raises(UsageError, match="a step of shapes"):
        Step(torch.ones(D, D), torch.ones(2, D, D), torch.ones(SITES, 1))
    with pytest.raises(UsageError, match="a step of shapes"):
        Step.of(torch.ones(D, D + 1))
    with pytest.raises(NumericsError, match="inf or nan"):
        Transform((Step.of(1e6 * torch.eye(D, dtype=torch.float64)),), D).on_weight(torch.ones(2, D).half())


def test_steps_that_cancel_stay_exact_in_float32() -> None:
    """U and V are 10⁵ times as large as their product; multiplied as they are in float32, they'd leave 10⁻³ of it."""
    generator = torch.Generator().manual_seed(2)
    mixed = normal(generator, 12, 12)
    left, right = normal(generator, 60, 12) @ mixed, torch.linalg.solve(mixed, normal(generator, 12, 60))
    stretch = torch.logspace(-3, 3, 12, dtype=torch.float64)
    left, right = left * stretch @ mixed, torch.linalg.solve(mixed, right / stretch[:, None])
    transform = Transform((Step.low_rank(left, right), Step.low_rank(left.flip(1), right.flip(0))), 60).collapse()
    assert transform.steps[0].change is not None
    assert transform.steps[0].change[0].shape[1] == 24
    weight = normal(generator, 40, 60).float()
    exact = weight.double() @ transform.matrix()
    plain = weight + (weight @ left.float()) @ right.float()
    assert relative(plain.double(), weight.double() @ Step.low_rank(left, right).shared) > 1e-5
    assert relative(transform.on_weight(weight).double(), exact) < 5e-7


@pytest.mark.parametrize("ranks", [(3,), (2, 3), (4, 4)])
def test_the_factors_of_collapsed_steps_are_exact(ranks: tuple[int, ...]) -> None:
    """By the small decomposition up to rank d / 2, by the whole one beyond."""
    generator = torch.Generator().manual_seed(3)
    steps = [Step.low_rank(normal(generator, D, r), normal(generator, r, D)) for r in ranks]
    transform = Transform(tuple(steps), D).collapse()
    assert (transform.steps[0].change is not None) is (sum(ranks) <= D // 2)
    left, right = transform.factors()
    assert left.shape[1] == sum(ranks)
    assert relative(left @ right, transform.matrix() - torch.eye(D, dtype=torch.float64)) < 1e-12
