"""SA's terms, Fisher information and whole step against references that are written from the paper and its code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from excise.edit.draws import generator
from excise.edit.parameters import SaParameters
from excise.edit.sa import fisher_information, fisher_penalty, sa_loss, sa_step, sa_weights
from tests.edit.trained_pipelines import denoiser_of, embedded


def test_the_terms_are_the_papers() -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 3), "b": (4,)}
    trained, original, fisher = ({n: rng.standard_normal(s) for n, s in shapes.items()} for _ in range(3))
    expected = sum((fisher[n] * (trained[n] - original[n]) ** 2).sum() for n in shapes)
    tensors = ({n: torch.from_numpy(v) for n, v in each.items()} for each in (trained, original, fisher))
    penalty = fisher_penalty(*tensors)
    assert float(penalty) == pytest.approx(expected, rel=1e-13)
    whole = sa_loss(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(0.5), gamma=0.1, lambda_=50.0)
    assert float(whole) == pytest.approx(2 + 0.3 + 25)


def test_the_weights_are_all_or_all_but_what_is_held(tiny_model: Path) -> None:
    denoiser = denoiser_of(tiny_model, lambda unet: sa_weights(unet, held=True))
    names = {name for name, _ in denoiser.unet.named_parameters()}
    left = {n for n in names if "attn2" in n or n.split(".")[0] in ("conv_out", "conv_norm_out", "time_embedding")}
    assert set(denoiser.trained) == names - left
    assert len(left) == 4 * 5 + 2 + 2 + 4
    assert set(sa_weights(denoiser.unet, held=False)) == names


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_fisher_information_is_the_square_of_a_sum_over_timesteps(tiny_model: Path, kind: str) -> None:
    """Against one backward pass for each timestep; a sum of squares would be something else."""
    denoiser = denoiser_of(tiny_model, lambda unet: sa_weights(unet, held=False)[-4:], kind=kind)
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = embedded(tiny_model, "cat", "dog")
    figures = SaParameters(fisher_timesteps=6, seed=1)
    expected, squares = ({n: torch.zeros_like(w) for n, w in denoiser.original.items()} for _ in range(2))
    alphas = denoiser.scheduler.alphas_cumprod
    for number in range(2):
        noise = torch.randn(6, 4, 8, 8, generator=generator(1, "fisher", number))
        sums = {name: torch.zeros_like(weight) for name, weight in denoiser.original.items()}
        for place, t in enumerate([0, 166, 333, 500, 666, 833]):
            alpha, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
            target = noise[place] if kind == "epsilon" else alpha * noise[place] - sigma * images[number]
            x = alpha * images[number] + sigma * noise[place]
            denoiser.unet.zero_grad()
            (denoiser.unet(x[None], t, states[number][None]).sample[0] - target).square().mean().backward()
            for name, weight in denoiser.trained.items():
                assert weight.grad is not None
                sums[name] += weight.grad * (1000 / 6)
                squares[name] += (weight.grad * (1000 / 6)) ** 2 / 2
        for name, total in sums.items():
            expected[name] += total**2 / 2
    *_, (done, found) = fisher_information(denoiser, images, lambda n: states[n][None], figures)
    assert done == 2
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4 * float(values.max()))
        assert not torch.allclose(found[name], squares[name], rtol=0.1)


def test_the_fisher_information_goes_on_where_it_stopped(tiny_model: Path) -> None:
    denoiser = denoiser_of(tiny_model, lambda unet: sa_weights(unet, held=False)[-2:])
    images = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = embedded(tiny_model, "cat")
    figures = SaParameters(fisher_timesteps=2)
    passes = fisher_information(denoiser, images, lambda n: states, figures)
    _, after_one = next(passes)
    after_one = {name: values.clone() for name, values in after_one.items()}
    *_, (_, whole) = passes
    *_, (done, resumed) = fisher_information(denoiser, images, lambda n: states, figures, done=1, fisher=after_one)
    assert done == 3
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_step_is_the_papers(tiny_model: Path) -> None:
    figures = SaParameters(**{"batch_size": 2, "gamma": 0.5, "lambda": 7.0, "seed": 3})
    denoiser = denoiser_of(tiny_model, lambda unet: sa_weights(unet, held=False))
    with torch.no_grad():
        for weight in denoiser.trained.values():
            weight.add_(0.01)
    fisher = {name: torch.full_like(weight, 0.25) for name, weight in denoiser.original.items()}
    surrogate, replay = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = embedded(tiny_model, "gun", "cat")
    draws, alphas = generator(3, "sa", 0), denoiser.scheduler.alphas_cumprod
    terms = []
    for images, text in ((surrogate, states[:1]), (replay, states[1:])):
        chosen = torch.randint(3, (2,), generator=draws)
        times = torch.randint(1000, (2,), generator=draws)
        noise = torch.randn(2, 4, 8, 8, generator=draws)
        a = alphas[times].view(2, 1, 1, 1)
        x = a.sqrt() * images[chosen] + (1 - a).sqrt() * noise
        terms.append(float((denoiser.unet(x, times, text.expand(2, -1, -1)).sample.detach() - noise).square().mean()))
    count = sum(weight.numel() for weight in denoiser.original.values())
    expected = terms[0] + 0.5 * terms[1] + 7 * 0.25 * 1e-4 * count
    texts = [lambda numbers, n=n: states[n : n + 1].expand(len(numbers), -1, -1) for n in (0, 1)]
    found = sa_step(denoiser, (surrogate, texts[0]), (replay, texts[1]), fisher, figures, 0)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-3)
