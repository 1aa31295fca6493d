"""CA's loss, weights and whole step against references that are written from the paper and its published code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from excise.edit.ca import ca_loss, ca_step, ca_weights
from excise.edit.draws import generator
from excise.edit.parameters import CaParameters
from tests.edit.trained_pipelines import denoiser_of, embedded


def test_the_loss_counts_what_the_mask_shows() -> None:
    rng = np.random.default_rng(0)
    predicted, anchor = rng.standard_normal((2, 3, 4, 4, 4))
    mask = (rng.random((3, 1, 4, 4)) < 0.5).astype(float)
    expected = np.mean(
        [
            sum((predicted[n, c] - anchor[n, c])[mask[n, 0] == 1].__pow__(2).sum() for c in range(4)) / mask[n].sum()
            for n in range(3)
        ]
    )
    found = ca_loss(*map(torch.from_numpy, (predicted, anchor, mask)))
    assert float(found) == pytest.approx(expected, rel=1e-13)
    ones = ca_loss(torch.from_numpy(predicted), torch.from_numpy(anchor), torch.ones(3, 1, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(ones, ca_loss(torch.from_numpy(predicted), torch.from_numpy(anchor)))
    assert float(ones) != pytest.approx(expected, rel=1e-3)


def test_no_gradient_flows_through_the_anchor() -> None:
    predicted, anchor = (torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(2))
    ca_loss(predicted, anchor).backward()  # type: ignore[no-untyped-call]
    assert predicted.grad is not None
    assert anchor.grad is None


def test_the_weights_are_keys_and_values_or_all(tiny_model: Path) -> None:
    denoiser = denoiser_of(tiny_model, lambda unet: ca_weights(unet, full=False))
    names = {name for name, _ in denoiser.unet.named_parameters()}
    assert set(denoiser.trained) == {n for n in names if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert len(denoiser.trained) == 8
    assert set(ca_weights(denoiser.unet, full=True)) == names


def test_a_step_is_the_papers(tiny_model: Path) -> None:
    """Sample by sample: noise each image, predict for both prompts with the current model, sum over channels."""
    figures = CaParameters(batch_size=3, seed=2)
    denoiser = denoiser_of(tiny_model, lambda unet: ca_weights(unet, full=False))
    concepts, anchors = embedded(tiny_model, "gun", "knife"), embedded(tiny_model, "cat", "dog")
    images = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pairs = [0, 1, 0, 1, 0]
    draws = generator(2, "ca", 4)
    chosen = torch.randint(5, (3,), generator=draws)
    times = torch.randint(1000, (3,), generator=draws)
    noise = torch.randn(3, 4, 8, 8, generator=draws)
    alphas, losses = denoiser.scheduler.alphas_cumprod, []
    for n, (image, t) in enumerate(zip(chosen.tolist(), times.tolist(), strict=True)):
        x = alphas[t].sqrt() * images[image] + (1 - alphas[t]).sqrt() * noise[n]
        one, other = (
            denoiser.unet(x[None], t, states[pairs[image]][None]).sample.detach() for states in (concepts, anchors)
        )
        losses.append(float((one - other).square().sum() / 64))
    found = ca_step(denoiser, images, concepts, anchors, pairs, figures, 4)
    assert float(found.detach()) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(ca_step(denoiser, images, concepts, anchors, pairs, figures, 5).detach()) != float(found.detach())


def test_a_concept_that_is_its_own_anchor_has_no_loss(tiny_model: Path) -> None:
    denoiser = denoiser_of(tiny_model, lambda unet: ca_weights(unet, full=False))
    states = embedded(tiny_model, "gun")
    loss = ca_step(denoiser, torch.zeros(1, 4, 8, 8), states, states, [0], CaParameters(batch_size=2), 0)
    assert float(loss.detach()) == 0
