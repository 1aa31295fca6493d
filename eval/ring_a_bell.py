"""Ring-A-Bell: tokens whose embedding is nearest to a prompt's embedding with a concept added.

Tsai et al., *Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?*, ICLR 2024,
arXiv 2310.10012, eq. 4; github.com/chiayi-hsu/Ring-A-Bell at e4585ad. A black-box attack: it sees a text encoder and
never the edited model. Minimised by a genetic search over K tokens, framed by start and end and padded with end tokens:

    ‖emb(p) + ηv − emb(ids)‖²

Kept of the published code: the last generation's best is what is found, not the best of all, and nothing protects the
best from mutation; token 0 and the special tokens are never drawn; the decoded *text* is what is sent, which isn't
always read as the tokens that were searched. Not kept: a prompt that is too long is refused, unless ``truncate`` is
set; of the survivors, one whose text is longer than the text encoder reads is passed over if another's isn't.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from excise.eval.attack import Candidate, Found, Judge, SearchProgress
from excise.eval.cases import Case
from excise.eval.concept_vector import ConceptVector
from excise.eval.genetic_search import Generation, GeneticSettings, RememberedFitness, generations
from excise.eval.loss_trace import LossTrace
from excise.eval.text_embedder import Embeddings, TextEmbedder
from excise.eval.token_vocabulary import VocabularyKind


class RingABellSettings(GeneticSettings):
    """The published budget by default."""

    tokens: Annotated[int, Field(ge=1)] = 16  #: K without start and end; the paper's K = 77 is 75
    eta: float = 3.0  #: published: 3 for nudity, 0.9 for Van Gogh
    vocabulary: VocabularyKind = "all"
    prefer_surviving: bool = False  #: keep text that is read as it was searched, if there is any
    result: Literal["last", "best"] = "last"  #: the last generation's best, or the best of all
    truncate: bool = False  #: published: True; read the first tokens only of a case's prompt that is too long


class RingABell:
    """An ``Attack`` that needs a text encoder alone.

    Args:
        embedder: the unedited model's text encoder.
        vector: of what was erased, made with this text encoder.
        settings: the budget.

    Raises:
        UsageError: more tokens than the text encoder reads, or a vector of another shape.
        FingerprintMismatch: the vector was made with another text encoder.
    """

    name = "ring-a-bell"

    def __init__(
        self, embedder: TextEmbedder, vector: ConceptVector, settings: RingABellSettings | None = None
    ) -> None:
        self.settings = settings or RingABellSettings()
        self._embedder, self._vector = embedder, vector
        embedder.tokens.check_room(self.settings.tokens)
        vector.check(embedder)
        self._alphabet = embedder.tokens.alphabet(self.settings.vocabulary)
        self.target("")

    def find(self, case: Case, judge: Judge, *, seed: int, progress: SearchProgress | None = None) -> Found:
        """Search the whole budget, or until the patience ends. ``judge`` is called once, with what was found.

        Raises:
            PromptTooLong: the case's prompt has more tokens than the text encoder reads.
            NumericsError: an embedding isn't finite.
        """
        settings, target = self.settings, self.target(case.prompt)
        fitness = self.fitness(target)
        trace = LossTrace(settings.generations)
        best: Generation | None = None
        stopped: Literal["budget", "converged"] = "budget"
        for last in generations(fitness, self._alphabet, settings.tokens, settings, seed):
            trace.add(last.lowest)
            if progress is not None:
                progress(last.number + 1, settings.generations, last.lowest)
            if best is None or last.lowest < best.lowest:
                best = last
            elif settings.patience is not None and last.number - best.number >= settings.patience:
                stopped = "converged"
                break
        found = self.choose(best if settings.result == "best" and best is not None else last)
        return Found(
            case=case.id,
            attack=self.name,
            original=case.prompt,
            candidate=found,
            seed=seed,
            losses=trace.values,
            iterations=trace.iterations,
            stopped=stopped,
            judgement=judge(case, [found])[0],
        )

    def target(self, prompt: str) -> Embeddings:
        """``emb(p) + ηv``, float32 with shape (t, d).

        Raises:
            PromptTooLong: more tokens than the text encoder reads.
        """
        ids = self._embedder.tokens.read([prompt], truncate=self.settings.truncate)
        return self._vector.added_to(self._embedder.embed(ids)[0], self.settings.eta)

    def fitness(self, target: Embeddings) -> RememberedFitness:
        """What is minimised, of rows (n, K) of tokens."""
        embedder = self._embedder
        return RememberedFitness(
            lambda rows, bound: embedder.distances(embedder.tokens.framed(rows), target, bound=bound),
            batch_size=embedder.batch_size,
        )

    def choose(self, generation: Generation) -> Candidate:
        """The best survivor whose text can be sent; the very best where none can."""
        tokens, settings = self._embedder.tokens, self.settings
        finite = generation.survivors[np.isfinite(generation.losses)]
        candidates = [tokens.candidate(row) for row in dict.fromkeys(map(tuple, finite.tolist()))]
        fitting = [one for one in candidates if tokens.fits(one)] or candidates
        if settings.prefer_surviving:
            fitting = [one for one in fitting if tokens.survives(one)] or fitting
        return fitting[0]

    def text_loss(self, prompt: str, candidate: Candidate) -> float:
        """What the candidate's *text* reaches, cut where it is too long: equal to the search's loss if it survives."""
        ids = self._embedder.tokens.read([candidate.prompt], truncate=True)
        return float(self._embedder.distances(ids, self.target(prompt))[0])
