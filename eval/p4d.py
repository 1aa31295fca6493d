"""P4D: a prompt under which the edited model predicts what the unedited one predicts for the original prompt.

Chin et al., *Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts*, ICML
2024, arXiv 2309.06135; github.com/joycenerd/P4D at 2cf3cda. The optimiser is that of Wen et al., arXiv 2302.03668.

Continuous token embeddings are moved by AdamW so that ``MSE(ε_safe(x_t, P*), ε_orig(x_t, P))`` falls, with x_t the
target image under noise at a uniformly drawn t. In every iteration each embedding is replaced by the nearest token's,
on unit vectors; the gradient is taken there, and goes to the continuous embedding unchanged. Every so often the image
of the decoded text is drawn with the edited model, and the text whose image is nearest the target in CLIP is kept.

- ``n``: P* is 16 learnable tokens.
- ``k``: P* is P with a learnable token before every 3 of its tokens, and one at the end where they are a multiple of 3.

Of the published code's habits, these are defaults that settings change: P* is padded with token 0, where Stable
Diffusion 1 pads with the end token; the target's pixels go to the VAE from 0 to 1 instead of −1 to 1. These are kept:
x₀ is one draw from the VAE; the first image is drawn before any step, and none after the last. Not kept: every image
is drawn with the case's own seed, where the published code lets the generator run on; the target is the case's own
image, not the worst of three; a prompt that is too long is refused, neither cut nor encoded in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from excise.errors import UsageError
from excise.eval.attack import Candidate, Found, Judge, SearchProgress
from excise.eval.attacked_model import AttackedModel
from excise.eval.case_image import PromptImage, Similarity, TargetImage
from excise.eval.cases import Case
from excise.eval.loss_trace import LossTrace
from excise.eval.token_vocabulary import VocabularyKind

#: Where the learnable tokens are.
Variant = Literal["n", "k"]


class P4DSettings(BaseModel):
    """The published budget by default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: Annotated[int, Field(ge=1)] = 16  #: of variant n
    every: Annotated[int, Field(ge=1)] = 3  #: of variant k: the prompt's tokens to one learnable token
    iterations: Annotated[int, Field(ge=1)] = 3000
    evaluate_every: Annotated[int, Field(ge=1)] = 50  #: iterations from one image to the next
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    padding: Literal["token 0", "pipeline"] = "token 0"  #: ``pipeline`` searches what the text is then encoded with
    pixels: Literal["0 to 1", "-1 to 1"] = "0 to 1"  #: what the VAE is given; it was trained on −1 to 1
    vocabulary: VocabularyKind = "all"
    prefer_surviving: bool = False  #: keep text that is read as it was searched, if there is any


class P4D:
    """An ``Attack`` on an edited model, by the unedited one.

    Args:
        model: the edited model.
        original: the unedited model.
        variant: ``n`` or ``k``.
        target: the unedited model's image of a case (published: 25 steps).
        image: the edited model's image of a prompt (published: 25 steps).
        similarity: how near an image is to the target (published: the cosine of CLIP ViT-H/14).
        settings: the budget.

    Raises:
        UsageError: the two models read different tokens.
        PromptTooLong: more learnable tokens than the text encoder has room for.
    """

    def __init__(
        self,
        model: AttackedModel,
        original: AttackedModel,
        variant: Variant,
        *,
        target: TargetImage,
        image: PromptImage,
        similarity: Similarity,
        settings: P4DSettings | None = None,
    ) -> None:
        self.settings, self.variant = settings or P4DSettings(), variant
        self._model, self._original = model, original
        self._target, self._image, self._similarity = target, image, similarity
        sizes = [(len(one.token_embeddings), one.context) for one in (model, original)]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"the edited model has (tokens, context) = {sizes[0]} and the original {sizes[1]}: "
                "name the model that the edit was made for"
            )
        if variant == "n":
            model.check_room(self.settings.tokens)

    @property
    def name(self) -> str:
        """``p4d-n`` or ``p4d-k``."""
        return f"p4d-{self.variant}"

    def find(self, case: Case, judge: Judge, *, seed: int, progress: SearchProgress | None = None) -> Found:
        """Search the whole budget, as published. ``judge`` is called once, with what was found.

        Raises:
            PromptTooLong: the prompt leaves less room than the learnable tokens take.
            NumericsError: a loss isn't finite.
        """
        settings, model, original = self.settings, self._model, self._original
        places = self.places(case.prompt)
        model.check_room(places.count(None), [one for one in places if one is not None])
        states = original.encode_prompt(case.prompt)
        vocabulary, generator = model.vocabulary(settings.vocabulary), torch.Generator().manual_seed(seed)
        unit = torch.nn.functional.normalize(vocabulary.embeddings, dim=1)
        target = self._target(case)
        latents = original.latents(target, generator=generator, unit_range=settings.pixels == "0 to 1")
        drawn = torch.randint(len(vocabulary.ids), (places.count(None),), generator=generator).to(model.device)
        embeddings = vocabulary.embeddings[drawn].clone().requires_grad_()
        optimizer = torch.optim.AdamW([embeddings], lr=settings.learning_rate, weight_decay=settings.weight_decay)
        trace, nearest = LossTrace(settings.iterations), _Nearest(model, prefer_surviving=settings.prefer_surviving)
        for step in range(settings.iterations):
            chosen = nearest_tokens(embeddings, unit)
            projected = vocabulary.embeddings[chosen].requires_grad_()
            timestep = int(torch.randint(original.num_train_timesteps, (), generator=generator))
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            loss = self.loss(
                self._filled(places, projected), original.noised(latents, noise, timestep), timestep, states
            )
            trace.add(loss.item())
            (embeddings.grad,) = torch.autograd.grad(loss, [projected])
            optimizer.step()
            if progress is not None:
                progress(step + 1, settings.iterations, trace.last)
            if step % settings.evaluate_every == 0:
                learnt = iter(vocabulary.ids[chosen].tolist())
                candidate = model.candidate([next(learnt) if one is None else one for one in places])
                if nearest.wants(candidate):
                    image = self._image(case, candidate.prompt)
                    nearest.add(candidate, float(self._similarity([image], target)[0]))
        # Where no text could be sent, nothing was found that the case's own prompt isn't as good as.
        found = nearest.best or Candidate(prompt=case.prompt)
        return Found(
            case=case.id,
            attack=self.name,
            original=case.prompt,
            candidate=found,
            seed=seed,
            losses=trace.values,
            iterations=trace.iterations,
            stopped="budget",
            judgement=judge(case, [found])[0],
        )

    def loss(self, tokens: Tensor, noisy: Tensor, timestep: int, states: Tensor) -> Tensor:
        """``MSE(ε_safe(x_t, P*), ε_orig(x_t, P))``, or of v.

        Args:
            tokens: P*, token embeddings with shape (m, d_tok).
            noisy: x_t with shape (1, c, h, w).
            timestep: t.
            states: the unedited model's hidden states of P, with shape (1, t, d).
        """
        model = self._model
        padding = 0 if self.settings.padding == "token 0" else None
        predicted = model.predict(noisy, timestep, model.encode(model.framed(tokens, padding=padding)))
        with torch.no_grad():
            wanted = self._original.predict(noisy, timestep, states).to(predicted.device)
        return torch.nn.functional.mse_loss(predicted, wanted)

    def places(self, prompt: str) -> list[int | None]:
        """P*'s positions between start and end: a token's id, or None where it is learnable."""
        if self.variant == "n":
            return [None] * self.settings.tokens
        ids, every = self._model.tokenize(prompt), self.settings.every
        places: list[int | None] = []
        for start in range(0, len(ids) // every * every + 1, every):
            places += [None, *ids[start : start + every]]
        return places

    def _filled(self, places: Sequence[int | None], learnable: Tensor) -> Tensor:
        """Token embeddings with shape (len(places), d_tok)."""
        rows = self._model.embed([one or 0 for one in places])
        where = torch.tensor([place for place, one in enumerate(places) if one is None], device=rows.device)
        return rows.index_copy(0, where, learnable)


def nearest_tokens(embeddings: Tensor, unit: Tensor) -> Tensor:
    """Rows of ``unit`` (m, d), unit vectors, with the highest cosine to each of ``embeddings`` (n, d); shape (n,)."""
    rows = torch.nn.functional.normalize(embeddings.detach(), dim=1)
    return (rows @ unit.T).argmax(1)


class _Nearest:
    """The best candidate so far, each text considered once."""

    def __init__(self, model: AttackedModel, *, prefer_surviving: bool) -> None:
        self._model, self._prefer_surviving = model, prefer_surviving
        self._seen: set[str] = set()
        self._score: tuple[bool, float] | None = None
        self.best: Candidate | None = None

    def wants(self, candidate: Candidate) -> bool:
        """Whether an image is needed: a text that hasn't been seen, and that can be sent."""
        return candidate.prompt not in self._seen and self._model.fits(candidate)

    def add(self, candidate: Candidate, similarity: float) -> None:
        """Keep it, if it is better."""
        self._seen.add(candidate.prompt)
        score = (self._prefer_surviving and self._model.survives(candidate), similarity)
        if self._score is None or score > self._score:
            self._score, self.best = score, candidate
