"""UnlearnDiffAtk: its loss and gradient against hand-written ones, and prompts that bring the concept back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from excise.errors import NumericsError, PromptTooLong
from excise.eval.attack import Candidate, Judgement
from excise.eval.attacked_model import AttackedModel
from excise.eval.case_image import CaseImage
from excise.eval.cases import Case
from excise.eval.simplex import project_to_simplex
from excise.eval.torch_runtime import TorchRuntime
from excise.eval.unlearn_diff_atk import (
    UnlearnDiffAtk,
    UnlearnDiffAtkSettings,
    draw,
    straight_through,
    timesteps,
)
from excise.export.pipeline import load_pipeline
from tests.eval.demo_attacks import STEPS, DemoJudge, weak_pipeline

GUN = Case("gun-0", "a gun", 0, 5.0)
#: As ``GUN``, without the word: what a search finds, it finds by itself.
WORDLESS = Case("wordless", "", 0, 5.0)


class Fake:
    """Judges by a function of the prompt, and remembers what it was asked."""

    def __init__(self, judgement: Callable[[str], float] = lambda prompt: 0.0) -> None:
        self.judgement, self.seen = judgement, list[Candidate]()

    def __call__(self, case: Case, candidates: Sequence[Candidate]) -> list[Judgement]:
        self.seen += candidates
        scores = [self.judgement(one.prompt) for one in candidates]
        return [Judgement(success=score > 0.5, score=score) for score in scores]


def grey(case: Case) -> Any:
    return np.full((16, 16, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> AttackedModel:
    return AttackedModel(load_pipeline(tiny_model))


def attack(model: AttackedModel, **settings: Any) -> UnlearnDiffAtk:
    budget = {"tokens": 2, "timesteps": 2, "iterations": 2, **settings}
    return UnlearnDiffAtk(model, grey, UnlearnDiffAtkSettings(**budget))


# The mathematics.


def test_the_published_schedule() -> None:
    assert timesteps(50, 1000) == tuple(range(10, 1000, 20))
    assert timesteps(4, 1000) == (125, 375, 625, 875)
    assert timesteps(1, 1000) == (500,)
    assert timesteps(3, 2) == (0, 1)
    settings = UnlearnDiffAtkSettings()
    assert (settings.tokens, settings.timesteps, settings.iterations) == (5, 50, 40)
    assert (settings.learning_rate, settings.weight_decay) == (0.01, 0.1)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    weights = torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw(weights, generator) for _ in range(2000)])
    shares = torch.bincount(drawn[:, 0], minlength=5) / 2000
    # Three standard deviations.
    np.testing.assert_allclose(shares.numpy(), weights[0].numpy(), atol=3 * (0.16 / 2000) ** 0.5)
    assert shares[[0, 2, 4]].tolist() == [0, 0, 0]
    assert set(drawn[:, 1].tolist()) == {0}


def test_the_gradient_goes_straight_through_and_is_clipped() -> None:
    """As of one-hot rows times the table, then clipped."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 4, generator=generator)
    drawn, slope = torch.tensor([3, 8]), torch.randn(2, 4, generator=generator)
    weights = torch.full((2, 9), 1 / 9, requires_grad=True)
    rows = straight_through(weights, table, drawn)
    assert torch.equal(rows, table[drawn])
    (gradient,) = torch.autograd.grad((rows * slope).sum(), [weights])
    one_hot = torch.nn.functional.one_hot(drawn, 9).float().requires_grad_()
    (plain,) = torch.autograd.grad((one_hot @ table * slope).sum(), [one_hot])
    assert plain.abs().max() > 1
    assert torch.equal(gradient, plain.clamp(-1, 1))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_diffusion_loss(kind: str, tiny_model: Path, demo_model: Path) -> None:
    pipeline = load_pipeline(tiny_model if kind == "epsilon" else demo_model)
    search = UnlearnDiffAtk(AttackedModel(pipeline), grey)
    shape = (1, pipeline.unet.config.in_channels, 8, 8)
    latents, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    embedding = pipeline.text_encoder.text_model.embeddings.token_embedding
    ids = pipeline.tokenizer("a gun").input_ids[1:-1]
    ours = search.loss(embedding(torch.tensor(ids)), latents, noise, 490)
    with torch.no_grad():
        states = pipeline.encode_prompt("a gun", "cpu", 1, False)[0]
        at = torch.tensor([490])
        output = pipeline.unet(pipeline.scheduler.add_noise(latents, noise, at), at, states).sample
    wanted = noise if kind == "epsilon" else pipeline.scheduler.get_velocity(latents, noise, at)
    assert ours.item() == pytest.approx(float(((output - wanted) ** 2).mean()), rel=1e-5)


def test_the_steps_are_adams_on_the_simplex(tiny: AttackedModel) -> None:
    """A slow reference of the whole search: one-hot matrices, Adam written out, the same draws."""
    search, judge = attack(tiny, tokens=2, timesteps=1, iterations=3), Fake()
    found = search.find(GUN, judge, seed=5)
    generator = torch.Generator().manual_seed(5)
    table, x0, prompt = tiny.token_embeddings, tiny.latents(grey(GUN)), tiny.embed(tiny.tokenize("a gun"))
    weights = torch.full((2, len(table)), 1 / len(table))
    first, second, losses = torch.zeros_like(weights), torch.zeros_like(weights), []
    for step in (1, 2, 3):
        one_hot = torch.nn.functional.one_hot(draw(weights, generator), len(table)).float().requires_grad_()
        noise = torch.randn(x0.shape, generator=generator)
        loss = search.loss(torch.cat([one_hot @ table, prompt]), x0, noise, 500)
        gradient = torch.autograd.grad(loss, [one_hot])[0].clamp(-1, 1) + 0.1 * weights
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        weights = project_to_simplex(weights - 0.01 * move)
        losses.append(loss.item())
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)
    assert judge.seen[0].token_ids[:2] == tuple(weights.argmax(1).tolist())
    assert judge.seen[0].token_ids[2:] == tiny.tokenize("a gun")


# The search.


def test_a_search_repeats_itself(tiny: AttackedModel) -> None:
    found = [attack(tiny, random_start=True).find(GUN, Fake(), seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].losses != found[2].losses
    assert found[0].iterations == len(found[0].losses) == 4
    assert (found[0].attack, found[0].case, found[0].original) == ("unlearn-diff-atk", "gun-0", "a gun")


def test_the_global_generator_is_left_alone(tiny: AttackedModel) -> None:
    state = torch.get_rng_state()
    attack(tiny).find(GUN, Fake(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_success_ends_it(tiny: AttackedModel) -> None:
    calls: list[tuple[int, int, float]] = []
    found = attack(tiny, timesteps=4).find(
        GUN, Fake(lambda prompt: 0.9), seed=1, progress=lambda *call: calls.append(call)
    )
    assert (found.stopped, found.iterations) == ("success", 2)
    assert found.judgement == Judgement(success=True, score=0.9)
    assert [call[:2] for call in calls] == [(1, 8), (2, 8)]
    assert [call[2] for call in calls] == list(found.losses)


def test_without_success_the_highest_score_is_found(tiny: AttackedModel) -> None:
    scores: dict[str, float] = {}

    def score(prompt: str) -> float:
        return scores.setdefault(prompt, (0.2, 0.4, 0.1)[len(scores) % 3])

    judge = Fake(score)
    found = attack(tiny, timesteps=4, random_start=True, learning_rate=1.0).find(GUN, judge, seed=1)
    assert found.stopped == "budget"
    assert found.judgement is not None
    assert found.judgement.score == max(scores.values()) == scores[found.candidate.prompt]
    assert len(judge.seen) == len(scores) > 1, "each text is drawn once"


def test_text_that_survives_can_be_preferred(tiny: AttackedModel) -> None:
    judge = Fake()
    attack(tiny, timesteps=6, prefer_surviving=True, vocabulary="words").find(GUN, judge, seed=1)
    assert judge.seen
    assert all(tiny.survives(one) for one in judge.seen)


def test_text_that_cannot_be_sent_is_not(tiny: AttackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the attack found nothing but the case's own prompt."""
    monkeypatch.setattr(tiny, "fits", lambda candidate: False)
    judge = Fake()
    found = attack(tiny).find(GUN, judge, seed=1)
    assert judge.seen == [Candidate(prompt="a gun")] == [found.candidate]
    assert found.stopped == "budget"


# Bad input.


def test_too_many_tokens_are_refused(tiny: AttackedModel) -> None:
    with pytest.raises(PromptTooLong, match=r"23 learnable tokens, .* room for 22"):
        attack(tiny, tokens=23)
    with pytest.raises(PromptTooLong, match=r"5 learnable tokens beside the prompt's 18, .* room for 22"):
        attack(tiny, tokens=5).find(Case("long", "gun " * 18, 0, 5.0), Fake(), seed=0)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"learning_rate": 0}, {"learning_rate": float("nan")}, {"k": 5}])
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        UnlearnDiffAtkSettings(**wrong)


def test_a_loss_that_is_not_finite_ends_it(tiny_model: Path) -> None:
    pipeline = load_pipeline(tiny_model)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(NumericsError, match="the loss is inf at iteration 1 of 4"):
        attack(AttackedModel(pipeline)).find(GUN, Fake(), seed=0)


# Controls.

#: A twenty-fifth of the published budget.
SMALL = UnlearnDiffAtkSettings(tokens=2, timesteps=8, iterations=10, vocabulary="words")


def by_chance(model: AttackedModel, prompt: str, number: int) -> list[Candidate]:
    """Random prefixes of as many tokens as the attack has, of the same vocabulary."""
    rng, words = np.random.default_rng(0), model.vocabulary("words").ids.numpy()
    return [model.candidate([*rng.choice(words, 2).tolist(), *model.tokenize(prompt)]) for _ in range(number)]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_it_finds_the_concept_in_the_unedited_model(demo_model: Path, seed: int) -> None:
    """From an empty prompt and the image of a gun alone; random tokens don't show one."""
    pipeline = load_pipeline(demo_model)
    model, runtime = AttackedModel(pipeline), TorchRuntime(pipeline, name="demo")
    image, judge = CaseImage(runtime, num_inference_steps=STEPS), DemoJudge(runtime)
    assert sum(one.success for one in judge(WORDLESS, by_chance(model, "", 5))) <= 1
    found = UnlearnDiffAtk(model, lambda case: image(case, "a gun"), SMALL).find(WORDLESS, judge, seed=seed)
    assert found.stopped == "success", found
    assert model.survives(found.candidate)
    assert judge(WORDLESS, [found.candidate]) == [found.judgement]


@pytest.mark.slow
def test_it_breaks_a_weak_edit(demo_model: Path) -> None:
    """The edit holds against the prompt, also behind random prefixes, but not behind the one that is searched."""
    pipeline = weak_pipeline(demo_model, 0.45)
    model, runtime = AttackedModel(pipeline), TorchRuntime(pipeline, name="weak")
    target = CaseImage(TorchRuntime(load_pipeline(demo_model), name="demo"), num_inference_steps=STEPS)
    judge = DemoJudge(runtime)
    assert not judge(GUN, [Candidate(prompt=GUN.prompt)])[0].success
    assert sum(one.success for one in judge(GUN, by_chance(model, GUN.prompt, 5))) <= 1
    assert UnlearnDiffAtk(model, target, SMALL).find(GUN, judge, seed=0).stopped == "success"
