"""What an edit file says of itself: one JSON document, validated by pydantic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

FORMAT_VERSION: Final = 2

#: Up to this many kept prompts are listed in the file; of more, only their number and digest.
LISTED = 1000


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Erased(_Frozen):
    """One concept and what it is turned into."""

    erase: str
    to: str


class Kept(_Frozen):
    """The prompts that were held: how many, the SHA-256 of them all, and the list where it is short."""

    count: int
    sha256: str
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(cls, prompts: Iterable[str]) -> Kept:
        """Describe ``prompts``, read once; memory doesn't grow beyond ``LISTED`` of them."""
        digest, listed, count = hashlib.sha256(), [], 0
        for prompt in prompts:
            digest.update(prompt.encode() + b"\0")
            count += 1
            if count <= LISTED:
                listed.append(prompt)
        return cls(count=count, sha256=digest.hexdigest(), prompts=tuple(listed) if count <= LISTED else ())


class Stream(_Frozen):
    """Linear layers that read one kind of text embedding, of width ``dim``: they share one transform.

    ``name`` is the family's ("text", "context", "pooled", …); ``sites`` are weight names relative to the component.
    """

    name: str
    dim: int
    sites: tuple[str, ...]


class Certified(_Frozen):
    """How well any text embedding of bounded norm regenerates a concept after one stage of the edit.

    ``errors[k]`` is the smallest relative error within ``radii[k]`` times each token's own norm, over all tokens of the
    concept; ``weakest[k]`` is the smallest over its single tokens; ``tokens[t][k]`` are those. 0 is a concept that can
    be brought back entirely.
    """

    stage: str
    stream: str
    concept: str
    radii: tuple[float, ...]
    errors: tuple[float, ...]
    weakest: tuple[float, ...]
    tokens: tuple[tuple[float, ...], ...] = ()


class StageFigures(_Frozen):
    """One stage of the method, in one stream: UCE's, an epoch of RECE, or all of another method.

    ``residual`` is how badly the edit *before* an epoch regenerates the concept without a bound (0: entirely);
    ``margin`` how badly within 1× the tokens' norm after it; ``moved`` is the relative movement of the kept prompts
    after it; ``detected`` the share of pictures generated from its derived embedding that show the concept, where a
    detector was given. An epoch that was tried and left out isn't ``accepted``.
    """

    stage: str
    stream: str
    residual: float | None = None
    margin: float | None = None
    moved: float
    detected: float | None = None
    accepted: bool = True


class EditMetadata(_Frozen):
    """Everything that made the edit, as stored in the file.

    ``recipe`` is the whole resolved recipe. ``on`` names the edits that the model carried already, in order. ``parts``
    are the edits that a stack was made of, in order, by id. ``source`` describes an imported checkpoint.
    """

    format_version: Literal[2] = FORMAT_VERSION
    excise_version: str
    method: str
    preset: str | None = None
    recipe: dict[str, Any]
    concepts: tuple[Erased, ...]
    kept: Kept
    token_rule: str
    family: str
    component: Literal["unet", "transformer"] = "unet"
    streams: tuple[Stream, ...]
    deltas: tuple[str, ...] = ()
    weights_fingerprint: str
    text_encoder_fingerprint: str
    on: tuple[str, ...] = ()
    parts: tuple[tuple[str, EditMetadata], ...] = ()
    source: dict[str, Any] | None = None
    stages: tuple[StageFigures, ...] = ()
    certificate: tuple[Certified, ...] = ()
