"""The closed form: the certificate's own optimum, the concept itself on an unedited model, and better than chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from excise.edit.certificate import certify_weights
from excise.edit.gram import gram
from excise.edit.regenerate import derive
from excise.edit.transform import Step, Transform
from excise.errors import ModelError, UsageError
from excise.eval.cases import Case
from excise.eval.closed_form_attack import ClosedFormAttack, System

DIM, TOKENS = 12, 5
CASE = Case("a", "a gun", 0, 5.0)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer{number}": torch.randn(9 + number, DIM, generator=generator).double() for number in range(3)}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def step() -> Step:
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(shape, generator=generator).double() for shape in ((DIM, 2), (2, DIM)))
    return Step.low_rank(-0.3 * left, right)


def encoder(tokens: torch.Tensor) -> Callable[..., Any]:
    return lambda prompts: tokens.float().numpy()[None]


def missed(weights: dict[str, torch.Tensor], edited: dict[str, torch.Tensor], tokens: Any, points: Any) -> torch.Tensor:
    """The oracle: Σ ‖W̃ c' − W c‖² of every token, layer by layer."""
    parts = [(points @ edited[name].T - tokens @ weights[name].T).square().sum(1) for name in weights]
    return torch.stack(parts).sum(0)


def test_the_certificates_optimum(weights: dict[str, torch.Tensor], tokens: torch.Tensor, step: Step) -> None:
    """Of a shared transform: the embeddings and errors that ``certify_weights`` gives, and eq. 8's ``derive``."""
    transform = Transform((step,), DIM)
    edited = {name: transform.on_weight(weight) for name, weight in weights.items()}
    system = System.of(weights, edited)
    margin = certify_weights(list(weights.values()), transform, tokens, radii=(0.5, 1.0, 2.0))
    for column, radius in enumerate(margin.radii):
        points = system.bounded(tokens, radius)
        assert torch.allclose(points, margin.adversaries()[:, column], atol=1e-9)
        assert torch.allclose(
            missed(weights, edited, tokens, points) / margin.sizes, margin.errors[:, column], atol=1e-9
        )
        assert bool((points.norm(dim=1) <= radius * tokens.norm(dim=1) * (1 + 1e-12)).all())
    expected = derive(gram(list(weights.values())), transform.matrix(), tokens, 0.1)
    assert torch.allclose(system.derived(tokens, 0.1), expected, atol=1e-10)


def test_no_edit_gets_below_it(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    """An edit of each layer by itself: no random embedding of the norm comes nearer, nor one close to the optimum."""
    generator = torch.Generator().manual_seed(3)
    edited = {
        name: weight + 0.5 * torch.randn(weight.shape, generator=generator).double() for name, weight in weights.items()
    }
    system = System.of(weights, edited)
    best = system.bounded(tokens, 1.0)
    least = missed(weights, edited, tokens, best)
    for scale in (1e-3, 1e-1, 10.0):
        for _ in range(50):
            other = best + scale * torch.randn(best.shape, generator=generator).double()
            other *= (tokens.norm(dim=1) / other.norm(dim=1)).clamp(max=1)[:, None]
            assert bool((missed(weights, edited, tokens, other) >= least - 1e-9).all())


def test_an_unedited_model_gives_the_concept_itself(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    system = System.of(weights, weights)
    assert torch.allclose(system.bounded(tokens, 1.0), tokens, atol=1e-9)
    assert torch.allclose(system.derived(tokens, 1e-12), tokens, atol=1e-9)
    made = ClosedFormAttack(system, encoder(tokens), radius=2).embed(CASE)
    assert (made.dtype, made.shape) == (np.float32, (TOKENS, DIM))
    assert np.allclose(made, tokens.numpy(), atol=1e-5)


def test_the_control_has_the_norms_and_nothing_else(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    system = System.of(weights, weights)
    derived = ClosedFormAttack(system, encoder(tokens)).embed(CASE)
    control = ClosedFormAttack(system, encoder(tokens), control=True)
    made = control.embed(CASE)
    assert np.allclose(np.linalg.norm(made, axis=1), np.linalg.norm(derived, axis=1), rtol=1e-5)
    assert np.abs(np.sum(made * derived, 1) / np.sum(derived**2, 1)).max() < 0.95
    assert np.array_equal(made, ClosedFormAttack(system, encoder(tokens), control=True).embed(CASE))
    assert not np.array_equal(made, ClosedFormAttack(system, encoder(tokens), control=True, seed=1).embed(CASE))


def test_names_and_refusals(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    system, encode = System.of(weights, weights), encoder(tokens)
    assert [
        ClosedFormAttack(system, encode).name,
        ClosedFormAttack(system, encode, radius=2.0).name,
        ClosedFormAttack(system, encode, radius=0.5).name,
        ClosedFormAttack(system, encode, control=True).name,
    ] == ["closed-form.derived", "closed-form.radius-2", "closed-form.radius-0.5", "closed-form.random"]
    for options in ({"ridge": 0.0}, {"ridge": float("nan")}, {"radius": -1.0}, {"radius": float("inf")}):
        with pytest.raises(UsageError, match="give a positive number"):
            ClosedFormAttack(system, encode, **options)
    with pytest.raises(UsageError, match="give no radius"):
        ClosedFormAttack(system, encode, radius=1.0, control=True)
    with pytest.raises(ModelError, match="name its own base"):
        System.of(weights, {**weights, "layer0": torch.zeros(3, DIM)})
    with pytest.raises(ModelError, match="name its own base"):
        System.of({}, {})
