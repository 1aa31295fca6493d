"""P4D: its loss, its optimiser and its layout against hand-written ones, and prompts that bring the concept back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError

from excise.errors import NumericsError, PromptTooLong, UsageError
from excise.eval.attack import Candidate, Judgement
from excise.eval.attacked_model import AttackedModel
from excise.eval.case_image import CaseImage, Image, ImageSimilarity
from excise.eval.cases import Case
from excise.eval.clip_encoder import ClipEncoder
from excise.eval.feature_extractor import Images
from excise.eval.p4d import P4D, P4DSettings, nearest_tokens
from excise.eval.torch_runtime import TorchRuntime
from excise.export.pipeline import cross_attention, load_pipeline
from tests.eval.demo_attacks import STEPS, DemoJudge, weak_pipeline

GUN = Case("gun-0", "a gun", 0, 5.0)


class Pictures:
    """A picture of a prompt is one grey level, drawn at random; its similarity is that level."""

    def __init__(self) -> None:
        self.levels: dict[str, int] = {}

    def __call__(self, case: Case, prompt: str | None = None) -> Image:
        text = case.prompt if prompt is None else prompt
        level = int(np.random.default_rng(list(text.encode())).integers(0, 256))
        if prompt is not None:
            assert text not in self.levels, "each text is drawn once"
            self.levels[text] = level
        return np.full((16, 16, 3), level, np.uint8)


def brightness(images: Images, target: Image) -> npt.NDArray[np.float64]:
    return np.array([float(image.mean()) for image in images])


class Judge:
    """Fails everything, and remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[Candidate] = []

    def __call__(self, case: Case, candidates: Sequence[Candidate]) -> list[Judgement]:
        self.seen += candidates
        return [Judgement(success=False, score=0.1) for _ in candidates]


@pytest.fixture(scope="module")
def original(tiny_model: Path) -> AttackedModel:
    return AttackedModel(load_pipeline(tiny_model))


@pytest.fixture(scope="module")
def edited_pipeline(tiny_model: Path) -> Any:
    pipeline = load_pipeline(tiny_model)
    parameters = dict(pipeline.unet.named_parameters())
    with torch.no_grad():
        for name in cross_attention(pipeline.unet):
            parameters[name].mul_(0.5)
    return pipeline


@pytest.fixture(scope="module")
def edited(edited_pipeline: Any) -> AttackedModel:
    return AttackedModel(edited_pipeline)


def attack(
    edited: AttackedModel,
    original: AttackedModel,
    variant: Any = "n",
    pictures: Pictures | None = None,
    **settings: Any,
) -> P4D:
    budget = {"tokens": 4, "iterations": 6, "evaluate_every": 2, **settings}
    pictures = pictures or Pictures()
    return P4D(
        edited,
        original,
        variant,
        target=pictures,
        image=pictures,
        similarity=brightness,
        settings=P4DSettings(**budget),
    )


# The mathematics.


def test_the_published_budget() -> None:
    settings = P4DSettings()
    assert (settings.tokens, settings.every, settings.iterations, settings.evaluate_every) == (16, 3, 3000, 50)
    assert (settings.learning_rate, settings.weight_decay) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(0, "L"), (1, "Lt"), (2, "Ltt"), (3, "LtttL"), (4, "LtttLt"), (7, "LtttLtttLt"), (9, "LtttLtttLtttL")],
)
def test_k_puts_a_token_before_every_third(
    edited: AttackedModel, original: AttackedModel, words: int, expected: str
) -> None:
    ids = edited.tokenize("gun knife axe bomb cat dog owl pig tree")[:words]
    prompt = edited.candidate(ids).prompt
    assert edited.tokenize(prompt) == ids
    places = attack(edited, original, "k").places(prompt)
    assert "".join("L" if one is None else "t" for one in places) == expected
    assert tuple(one for one in places if one is not None) == ids


def test_n_has_learnable_tokens_only(edited: AttackedModel, original: AttackedModel) -> None:
    assert attack(edited, original, tokens=3).places("a gun") == [None] * 3


def test_the_nearest_token_is_by_angle() -> None:
    table = torch.tensor([[10.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])
    unit = torch.nn.functional.normalize(table, dim=1)
    # By distance, the second would be (0, 0.1) as well.
    assert nearest_tokens(torch.tensor([[0.1, 0.5], [0.3, 0.1], [-9.0, -8.0]]), unit).tolist() == [1, 0, 2]
    assert nearest_tokens(5 * table, unit).tolist() == [0, 1, 2]


@pytest.mark.parametrize("padding", ["token 0", "pipeline"])
def test_the_loss_compares_the_two_unets(
    edited: AttackedModel, original: AttackedModel, edited_pipeline: Any, tiny_model: Path, padding: str
) -> None:
    plain = load_pipeline(tiny_model)
    search = attack(edited, original, padding=padding)
    noisy, found = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [40, 50, 60, 70]
    ours = search.loss(edited.embed(found), noisy, 321, original.encode_prompt("a gun"))
    end = plain.tokenizer.eos_token_id
    pad = 0 if padding == "token 0" else plain.tokenizer.pad_token_id
    ids = torch.tensor([[plain.tokenizer.bos_token_id, *found, end, *[pad] * 18]])
    with torch.no_grad():
        at = torch.tensor([321])
        safe = edited_pipeline.unet(noisy, at, edited_pipeline.text_encoder(ids)[0]).sample
        wanted = plain.unet(noisy, at, plain.encode_prompt("a gun", "cpu", 1, False)[0]).sample
    assert ours.item() == pytest.approx(float(((safe - wanted) ** 2).mean()), rel=1e-5)


@pytest.mark.parametrize("variant", ["n", "k"])
def test_the_steps_are_adamws(edited: AttackedModel, original: AttackedModel, variant: str) -> None:
    """A slow reference of the whole search: AdamW written out, every token projected, the same draws."""
    pictures = Pictures()
    search = attack(edited, original, variant, pictures, tokens=4, iterations=4, evaluate_every=1)
    found = search.find(GUN, Judge(), seed=3)
    generator = torch.Generator().manual_seed(3)
    table, states = edited.token_embeddings, original.encode_prompt("a gun")
    x0 = original.latents(Pictures()(GUN), generator=generator, unit_range=True)
    places = search.places("a gun")
    free = torch.tensor([one is None for one in places])
    embeddings = edited.embed([one or 0 for one in places])
    embeddings[free] = table[torch.randint(len(table), (int(free.sum()),), generator=generator)]
    first, second, losses, texts = torch.zeros_like(embeddings), torch.zeros_like(embeddings), [], []
    for step in range(1, 5):
        cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], table[None], dim=2)
        chosen = cosines.argmax(1)
        tokens = table[chosen].requires_grad_()
        at = int(torch.randint(1000, (), generator=generator))
        noisy = original.noised(x0, torch.randn(x0.shape, generator=generator), at)
        loss = search.loss(tokens, noisy, at, states)
        # As published: every position is moved, with no gradient where the token is the prompt's.
        gradient = torch.autograd.grad(loss, [tokens])[0] * free[:, None]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        embeddings = embeddings * (1 - 0.1 * 0.1) - 0.1 * move
        losses.append(loss.item())
        texts.append(edited.candidate(chosen.tolist()).prompt)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)
    assert list(pictures.levels) == list(dict.fromkeys(texts))
    if variant == "k":
        ids = edited.tokenize("a gun")
        assert found.candidate.token_ids[1:] == ids


# The search.


def test_the_nearest_image_is_kept(edited: AttackedModel, original: AttackedModel) -> None:
    pictures, judge = Pictures(), Judge()
    calls: list[tuple[int, int, float]] = []
    search = attack(edited, original, "n", pictures, iterations=7, evaluate_every=3)
    found = search.find(GUN, judge, seed=1, progress=lambda *call: calls.append(call))
    assert 1 <= len(pictures.levels) <= 3, "after iterations 1, 4 and 7"
    assert found.candidate.prompt == max(pictures.levels, key=lambda text: pictures.levels[text])
    assert judge.seen == [found.candidate]
    assert (found.stopped, found.iterations, found.attack) == ("budget", 7, "p4d-n")
    assert found.judgement == Judgement(success=False, score=0.1)
    assert [call[:2] for call in calls] == [(step, 7) for step in range(1, 8)]
    assert tuple(call[2] for call in calls) == found.losses


def test_a_search_repeats_itself(edited: AttackedModel, original: AttackedModel) -> None:
    state = torch.get_rng_state()
    found = [attack(edited, original, "k").find(GUN, Judge(), seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].losses != found[2].losses
    assert found[0].attack == "p4d-k"
    assert torch.equal(torch.get_rng_state(), state)


def test_text_that_survives_can_be_preferred(
    edited: AttackedModel, original: AttackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = Pictures()
    search = attack(edited, original, "n", pictures, iterations=8, evaluate_every=1, prefer_surviving=True)
    first: list[str] = []

    def survives(candidate: Candidate) -> bool:
        first.append(candidate.prompt)
        return candidate.prompt == first[0]

    monkeypatch.setattr(edited, "survives", survives)
    found = search.find(GUN, Judge(), seed=1)
    assert found.candidate.prompt == first[0]
    assert len(pictures.levels) > 1
    assert pictures.levels[first[0]] < max(pictures.levels.values()), "another was brighter"


def test_text_that_cannot_be_sent_is_not(
    edited: AttackedModel, original: AttackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edited, "fits", lambda candidate: False)
    pictures, judge = Pictures(), Judge()
    found = attack(edited, original, "n", pictures).find(GUN, judge, seed=1)
    assert pictures.levels == {}
    assert judge.seen == [Candidate(prompt="a gun")] == [found.candidate]


# Bad input.


def test_too_many_tokens_are_refused(edited: AttackedModel, original: AttackedModel) -> None:
    with pytest.raises(PromptTooLong, match=r"23 learnable tokens, .* room for 22"):
        attack(edited, original, tokens=23)
    long = Case("long", "gun " * 18, 0, 5.0)
    with pytest.raises(PromptTooLong, match=r"7 learnable tokens beside the prompt's 18, .* room for 22"):
        attack(edited, original, "k", tokens=99).find(long, Judge(), seed=0)
    attack(edited, original, "n", iterations=1).find(long, Judge(), seed=0)


def test_two_models_of_other_tokens_are_refused(edited: AttackedModel, demo_model: Path) -> None:
    other = load_pipeline(demo_model)
    other.tokenizer.model_max_length = 12
    with pytest.raises(UsageError, match=r"\(711, 24\) and the original \(711, 12\)"):
        attack(edited, AttackedModel(other))


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"iterations": 0}, {"padding": "zero"}, {"lr": 0.1}])
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        P4DSettings(**wrong)


def test_a_loss_that_is_not_finite_ends_it(original: AttackedModel, tiny_model: Path) -> None:
    pipeline = load_pipeline(tiny_model)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match="the loss is nan at iteration 1 of 6"):
        attack(AttackedModel(pipeline), original).find(GUN, Judge(), seed=0)


# Controls.


def small(variant: Any, model: AttackedModel, original: AttackedModel, runtimes: list[TorchRuntime], clip: Path) -> P4D:
    """Two tokens, a fiftieth of the published iterations, and an image after every few."""
    images = [CaseImage(runtime, num_inference_steps=STEPS) for runtime in runtimes]
    settings = P4DSettings(tokens=2, iterations=60, evaluate_every=5, vocabulary="words", padding="pipeline")
    similarity = ImageSimilarity(ClipEncoder(clip))
    return P4D(model, original, variant, target=images[1], image=images[0], similarity=similarity, settings=settings)


def by_chance(model: AttackedModel, number: int) -> list[Candidate]:
    """Random prompts of as many tokens as the attack has, of the same vocabulary."""
    rng, words = np.random.default_rng(0), model.vocabulary("words").ids.numpy()
    return [model.candidate(rng.choice(words, 2).tolist()) for _ in range(number)]


@pytest.mark.parametrize(
    "name", ["gun", pytest.param("bomb", marks=pytest.mark.slow), pytest.param("sword", marks=pytest.mark.slow)]
)
def test_it_finds_the_concept_in_the_unedited_model(demo_model: Path, demo_clip: Path, name: str) -> None:
    """Without the prompt, which only the other model reads; random tokens don't show it."""
    pipeline = load_pipeline(demo_model)
    model, runtime = AttackedModel(pipeline), TorchRuntime(pipeline, name="demo")
    judge, case = DemoJudge(runtime), Case(f"{name}-0", f"a {name}", 0, 5.0)
    found = small("n", model, model, [runtime, runtime], demo_clip).find(case, judge, seed=0)
    assert found.judgement is not None
    assert found.judgement.success, found
    assert len(found.candidate.token_ids) == 2
    assert model.survives(found.candidate)
    assert sum(one.success for one in judge(case, by_chance(model, 5))) <= 1


@pytest.mark.slow
def test_it_finds_the_concept_behind_a_weak_edit(demo_model: Path, demo_clip: Path) -> None:
    """The edit is so weak that the prompt itself still works; the search isn't told it, and random tokens don't."""
    pipelines = [weak_pipeline(demo_model, 0.35), load_pipeline(demo_model)]
    model, original = (AttackedModel(pipeline) for pipeline in pipelines)
    runtimes = [TorchRuntime(pipeline, name="demo") for pipeline in pipelines]
    judge = DemoJudge(runtimes[0])
    assert sum(one.success for one in judge(GUN, by_chance(model, 5))) <= 1
    found = small("n", model, original, runtimes, demo_clip).find(GUN, judge, seed=0)
    assert found.judgement is not None
    assert found.judgement.success, found
