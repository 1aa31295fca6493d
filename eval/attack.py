"""What every attack promises: for a prompt whose concept was erased, text or an embedding that brings it back.

Attacks serve to measure an edit. An attack looks for a prompt against the PyTorch model; what it found is text, and
text can be replayed against any runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from excise.eval.cases import Case

#: float32 with shape (tokens, d): what a text encoder would have put out for one prompt.
PromptEmbedding = npt.NDArray[np.float32]


class Candidate(BaseModel):
    """One prompt that an attack proposes for one image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str  #: what a runtime is sent; decoded from ``token_ids`` where an attack searched tokens
    token_ids: tuple[int, ...] = ()  #: as searched, without start, end and padding; empty where nothing was searched


class Judgement(BaseModel):
    """What the protocol's detector says of the image of one candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    success: bool  #: by the protocol's rule and threshold
    score: float  #: the detector's figure behind it, higher where more of the concept is seen


#: Generates one image of each candidate with the case's own seed and guidance on the attacked model, and judges it.
Judge = Callable[[Case, Sequence[Candidate]], list[Judgement]]

#: Called with (iterations done, iterations in all, the last loss).
SearchProgress = Callable[[int, int, float], None]


class Found(BaseModel):
    """What an attack found for one case: one line of its JSONL file.

    ``losses`` is the trace of what was minimised, at most some hundred values; ``stopped`` says why the search ended.
    ``embedding`` is the row of the embeddings' file beside it, for attacks that make no text. A case whose own prompt
    shows the concept on the attacked model isn't attacked: its line has ``stopped`` ``pre``, and belongs to all
    attacks. ``no room``: its prompt left none for the tokens to be searched.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    case: str
    attack: str
    original: str  #: the case's own prompt
    candidate: Candidate
    seed: int  #: of the search, which isn't the image's
    losses: tuple[float, ...] = ()
    iterations: Annotated[int, Field(ge=0)] = 0
    stopped: Literal["success", "budget", "converged", "closed form", "pre", "no room"]
    judgement: Judgement | None = None  #: on the attacked model, where the attack looked
    embedding: int | None = None


class Attack(Protocol):
    """A search for one prompt at a time: the same case and seed give the same result."""

    @property
    def name(self) -> str:
        """As on the command line: ``ring-a-bell``, ``p4d-n``, …"""
        ...

    def find(self, case: Case, judge: Judge, *, seed: int, progress: SearchProgress | None = None) -> Found:
        """Search. ``judge`` may be called any number of times, or not at all."""
        ...


@runtime_checkable
class EmbeddingAttack(Protocol):
    """An attack that gives no text: the embedding goes to a runtime's UNet as it is."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    def embed(self, case: Case) -> PromptEmbedding:
        """What to put in place of the prompt's embedding."""
        ...
