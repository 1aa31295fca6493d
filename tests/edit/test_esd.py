"""ESD's target, weights and whole step against references that are written from the paper."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from excise.edit.draws import generator
from excise.edit.esd import Variant, esd_loss, esd_step, esd_target, esd_weights
from excise.edit.parameters import EsdParameters
from tests.edit.trained_pipelines import denoiser_of, embedded


def test_the_target_moves_away_from_the_concept() -> None:
    rng = np.random.default_rng(0)
    come_from, concept, null, predicted = (rng.standard_normal((2, 3, 4, 4)) for _ in range(4))
    expected = come_from - 1.5 * (concept - null)
    target = esd_target(*map(torch.from_numpy, (come_from, concept, null)), negative_guidance=1.5)
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-15)
    loss = float(esd_loss(torch.from_numpy(predicted), target))
    assert loss == pytest.approx(np.mean((predicted - expected) ** 2), rel=1e-14)


def test_predicting_velocities_is_predicting_noise_but_for_a_weight() -> None:
    """The target in v, turned into noise, is the target in noise; distances differ by α²."""
    rng = torch.Generator().manual_seed(0)
    alpha, sigma = 0.6, 0.8
    latents, *velocities = (torch.randn(1, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(5))
    *frozen, trained = velocities
    noises = [alpha * v + sigma * latents for v in frozen]
    in_v, in_noise = (esd_target(*three, negative_guidance=2.0) for three in (frozen, noises))
    torch.testing.assert_close(alpha * in_v + sigma * latents, in_noise)
    noise_loss = esd_loss(alpha * trained + sigma * latents, in_noise)
    torch.testing.assert_close(noise_loss, alpha**2 * esd_loss(trained, in_v))
    # Weights that don't sum to 1 would not carry over.
    wrong = [v * 1.1 for v in (in_v, in_noise)]
    assert not torch.allclose(alpha * wrong[0] + sigma * latents, wrong[1])


EXPECTED = {
    "esd-x": lambda name: ".attn2." in name,
    "esd-u": lambda name: ".attn2." not in name and "norm" not in name,
    "esd-full": lambda name: "norm" not in name,
}


@pytest.mark.parametrize("variant", EXPECTED)
def test_each_variant_trains_its_weights(tiny_model: Path, variant: Variant) -> None:
    denoiser = denoiser_of(tiny_model, lambda unet: esd_weights(unet, variant))
    names = [name for name, _ in denoiser.unet.named_parameters()]
    assert set(denoiser.trained) == set(filter(EXPECTED[variant], names))
    assert [name for name, p in denoiser.unet.named_parameters() if p.requires_grad] == [
        name for name in names if name in denoiser.trained
    ]
    kinds = {name.partition(".attn2.")[2] for name in denoiser.trained} - {""}
    cross = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}
    assert kinds == (set() if variant == "esd-u" else cross)


def reference(unet: Any, alphas: torch.Tensor, concept: torch.Tensor, null: torch.Tensor, seed: int, i: int) -> Any:
    """ESD's loss with two UNets and DDIM written out (Song et al., 2021, eq. 12, η = 0), four steps, offset 1."""
    frozen = copy.deepcopy(unet)
    draws = generator(seed, "esd", i)
    until = int(torch.randint(4, (), generator=draws))
    torch.randint(1, (1,), generator=draws)
    x = torch.randn(1, 4, 8, 8, generator=draws)
    times = [751, 501, 251, 1]
    with torch.no_grad():
        for place in range(until):
            t, after = times[place], times[place] - 250
            without, given = (frozen(x, t, states).sample for states in (null, concept))
            noise = without + 3 * (given - without)
            a, b = alphas[t], alphas[after] if after >= 0 else alphas[0]
            x = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
        given, without = (frozen(x, times[until], states).sample for states in (concept, null))
    return until, (unet(x, times[until], concept).sample - (given - 2 * (given - without))).square().mean()


def test_a_step_is_the_papers(tiny_model: Path) -> None:
    figures = EsdParameters(num_inference_steps=4, seed=5)
    states = embedded(tiny_model, "a gun", "")
    denoiser = denoiser_of(tiny_model, lambda unet: esd_weights(unet, "esd-x"))
    with torch.no_grad():
        # The trained model is another than the frozen one.
        for weight in denoiser.trained.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    reached = set()
    original = copy.deepcopy(denoiser.unet)
    original.load_state_dict(denoiser.original, strict=False)
    for iteration in range(6):
        loss = esd_step(denoiser, states[:1], states[1:], figures, iteration)
        until, expected = _reference_with(original, denoiser, states, figures.seed, iteration)
        reached.add(until)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)
        again = esd_step(denoiser, states[:1], states[1:], figures, iteration)
        assert torch.equal(loss, again)
    assert len(reached) > 2


def _reference_with(original: Any, denoiser: Any, states: torch.Tensor, seed: int, iteration: int) -> Any:
    """The reference, of which the trained model differs from the frozen one."""

    class Both(torch.nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            return original

        def forward(self, *arguments: Any) -> Any:
            return denoiser.unet(*arguments)

    return reference(Both(), denoiser.scheduler.alphas_cumprod, states[:1], states[1:], seed, iteration)


def test_only_trained_weights_get_a_gradient_and_the_frozen_model_stays(tiny_model: Path) -> None:
    denoiser = denoiser_of(tiny_model, lambda unet: esd_weights(unet, "esd-x"))
    states = embedded(tiny_model, "a gun", "")
    before = {name: p.detach().clone() for name, p in denoiser.unet.named_parameters()}
    figures = EsdParameters(num_inference_steps=3)
    esd_step(denoiser, states[:1], states[1:], figures, 1).backward()  # type: ignore[no-untyped-call]
    for name, parameter in denoiser.unet.named_parameters():
        assert (parameter.grad is not None) == (name in denoiser.trained)
        assert torch.equal(parameter, before[name])
    with torch.no_grad():
        next(iter(denoiser.trained.values())).add_(1)
    latents, t = torch.zeros(1, 4, 8, 8), torch.tensor(5)
    assert not torch.equal(
        denoiser.predict_original(latents, t, states[:1]), denoiser.predict(latents, t, states[:1]).detach()
    )
