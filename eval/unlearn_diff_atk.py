"""UnlearnDiffAtk: a prefix of few tokens under which the edited model denoises the image that it was to forget.

Zhang et al., *To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images …
For Now*, ECCV 2024, arXiv 2310.11868, eq. 5; github.com/OPTML-Group/Diffusion-MU-Attack at 5a3e5d3, ``text_grad``.

k distributions over the vocabulary, as rows w of a simplex, are moved so that ``MSE(ε, ε_θ(x_t, prefix + prompt))``
falls, where x_t is the target image under noise. Each iteration draws a token from each row and feeds it as it is; the
gradient with respect to its one-hot vector is clipped to [−1, 1] element by element and taken as the gradient of w;
after Adam's step, w is projected back onto the simplex. t runs upwards, with a number of iterations at each; after
each t the rows' likeliest tokens are decoded, and the search ends when a detector finds the concept in their image.

Of the published code's habits, these are kept: fresh noise in every iteration; the VAE's mean as x₀; a start from
equal probabilities; images of the *decoded text*, not of the searched tokens. Not kept: prompts that are too long are
refused rather than cut, padding is the pipeline's own (the same for Stable Diffusion 1), and the sums of w are 1 to
rounding rather than to 1e-5.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from excise.eval.attack import Candidate, Found, Judge, Judgement, SearchProgress
from excise.eval.attacked_model import AttackedModel
from excise.eval.case_image import TargetImage
from excise.eval.cases import Case
from excise.eval.loss_trace import LossTrace
from excise.eval.simplex import project_to_simplex
from excise.eval.token_vocabulary import VocabularyKind


class UnlearnDiffAtkSettings(BaseModel):
    """The published budget by default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: Annotated[int, Field(ge=1)] = 5  #: k; published: 5 for nudity and violence, 3 for a style or an object
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 50  #: evenly spread: 10, 30, …, 990
    iterations: Annotated[int, Field(ge=1)] = 40  #: at each timestep
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    random_start: bool = False  #: start from random rows instead of equal probabilities
    vocabulary: VocabularyKind = "all"
    prefer_surviving: bool = False  #: only judge text that is read as it was searched, if there is any


class UnlearnDiffAtk:
    """An ``Attack`` on one model; it needs no other.

    Args:
        model: the edited model.
        target: the *unedited* model's image of a case.
        settings: the budget.

    Raises:
        PromptTooLong: more learnable tokens than the text encoder has room for.
    """

    name = "unlearn-diff-atk"

    def __init__(
        self, model: AttackedModel, target: TargetImage, settings: UnlearnDiffAtkSettings | None = None
    ) -> None:
        self.settings = settings or UnlearnDiffAtkSettings()
        self._model, self._target = model, target
        model.check_room(self.settings.tokens)

    def find(self, case: Case, judge: Judge, *, seed: int, progress: SearchProgress | None = None) -> Found:
        """Search. ``judge`` is called with one candidate after each timestep, unless it has seen that prompt.

        The case's own prompt isn't tried. Where nothing succeeds, the candidate is the one with the highest score.

        Raises:
            PromptTooLong: the prompt leaves less room than the learnable tokens take.
            NumericsError: a loss isn't finite.
        """
        settings, model = self.settings, self._model
        prompt = model.tokenize(case.prompt)
        model.check_room(settings.tokens, prompt)
        vocabulary, generator = model.vocabulary(settings.vocabulary), torch.Generator().manual_seed(seed)
        latents = model.latents(self._target(case)).to(model.device)
        weights = self._start(len(vocabulary.ids), generator)
        optimizer = torch.optim.Adam([weights], lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = timesteps(settings.timesteps, model.num_train_timesteps)
        trace = LossTrace(len(schedule) * settings.iterations)
        judged = _Judged(model, case, judge, only_surviving=settings.prefer_surviving)
        for timestep in schedule:
            for _ in range(settings.iterations):
                drawn = draw(weights, generator)
                prefix = straight_through(weights, vocabulary.embeddings, drawn)
                noise = torch.randn(latents.shape, generator=generator).to(latents.device)
                loss = self.loss(torch.cat([prefix, model.embed(prompt)]), latents, noise, timestep)
                trace.add(loss.item())
                (weights.grad,) = torch.autograd.grad(loss, [weights])
                optimizer.step()
                weights.data = project_to_simplex(weights)
                if progress is not None:
                    progress(trace.iterations, len(schedule) * settings.iterations, trace.last)
            likeliest = vocabulary.ids[weights.detach().argmax(1)].tolist()
            if judged.succeeds(model.candidate([*likeliest, *prompt])):
                break
        candidate, judgement = judged.best()
        return Found(
            case=case.id,
            attack=self.name,
            original=case.prompt,
            candidate=candidate,
            seed=seed,
            losses=trace.values,
            iterations=trace.iterations,
            stopped="success" if judgement.success else "budget",
            judgement=judgement,
        )

    def loss(self, tokens: Tensor, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """``MSE(ε, ε_θ(x_t, tokens))``, or of v, for token embeddings (m, d_tok), x₀ and ε with shape (1, c, h, w)."""
        model = self._model
        states = model.encode(model.framed(tokens))
        predicted = model.predict(model.noised(latents, noise, timestep), timestep, states)
        return torch.nn.functional.mse_loss(
            predicted, model.training_target(latents, noise, timestep).to(predicted.device)
        )

    def _start(self, count: int, generator: torch.Generator) -> Tensor:
        shape = (self.settings.tokens, count)
        rows = torch.rand(shape, generator=generator) if self.settings.random_start else torch.full(shape, 1 / count)
        return project_to_simplex(rows).to(self._model.device).requires_grad_()


def timesteps(number: int, train_timesteps: int) -> tuple[int, ...]:
    """``number`` timesteps, each in the middle of its share: 10, 30, …, 990 for 50 of 1000."""
    share = max(1, train_timesteps // number)
    return tuple(range(share // 2, train_timesteps, share))[:number]


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One index by each row's probabilities, int64 with shape (k,), for rows with shape (k, m) that sum to about 1.

    The uniform numbers come from the CPU, so that every device draws the same.
    """
    cumulative = weights.detach().double().cumsum(1)
    uniform = torch.rand((len(weights), 1), generator=generator, dtype=torch.float64).to(weights.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, drawn: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return table[drawn]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return torch.nn.functional.hardtanh(gradients[0] @ table.T), None, None


def straight_through(weights: Tensor, table: Tensor, drawn: Tensor) -> Tensor:
    """Rows ``drawn`` (k,) of ``table`` (m, d), with shape (k, d).

    To ``weights`` (k, m) goes the gradient of the one-hot vectors that would have picked them, clipped to [−1, 1].
    """
    rows: Tensor = _StraightThrough.apply(weights, table, drawn)
    return rows


class _Judged:
    """Candidates as they are judged, each text once."""

    def __init__(self, model: AttackedModel, case: Case, judge: Judge, *, only_surviving: bool) -> None:
        self._model, self._case, self._judge, self._only_surviving = model, case, judge, only_surviving
        self._judgements: dict[str, tuple[Candidate, Judgement]] = {}
        self._passed_over: Candidate | None = None

    def succeeds(self, candidate: Candidate) -> bool:
        """Judge it, where it can be sent and hasn't been before."""
        if not self._model.fits(candidate):
            return False
        if self._only_surviving and not self._model.survives(candidate):
            self._passed_over = candidate
            return False
        return self._of(candidate).success

    def best(self) -> tuple[Candidate, Judgement]:
        """A success if there is one, or the highest score; the case's own prompt, where nothing could be sent."""
        if not self._judgements:
            self._of(self._passed_over or Candidate(prompt=self._case.prompt))
        return max(self._judgements.values(), key=lambda pair: (pair[1].success, pair[1].score))

    def _of(self, candidate: Candidate) -> Judgement:
        if candidate.prompt not in self._judgements:
            self._judgements[candidate.prompt] = (candidate, self._judge(self._case, [candidate])[0])
        return self._judgements[candidate.prompt][1]
