"""What an edit file says of itself: one JSON document, validated by pydantic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

FORMAT_VERSION: Final = 2

#: Up to this many kept prompts are listed in the file; of more, only their number and digest.
LISTED = 1000


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Grown(_Frozen):
    """A part of the document that has grown by the optional fields ``GROWN``.

    Where they say nothing they aren't written: an edit's id is a digest of the document, and a file that was made
    before they were there keeps its id.
    """

    GROWN: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = handler(self)
        return {name: value for name, value in document.items() if value is not None or name not in self.GROWN}


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


class StageFigures(_Grown):
    """One stage of the method, in one stream: UCE's, an epoch of RECE, or all of another method.

    ``residual`` is how badly the edit *before* an epoch regenerates the concept without a bound (0: entirely);
    ``margin`` how badly within 1× the tokens' norm after it; ``moved`` is the relative movement of the kept prompts
    after it. Where a detector was given, ``detected`` is the share of pictures that show the concept, generated from
    the epoch's derived embedding by the model *before* it; ``detected_after`` the same of what is derived after it,
    where the number of epochs was left to the detector. An epoch that was tried and left out isn't ``accepted``.
    """

    stage: str
    stream: str
    residual: float | None = None
    margin: float | None = None
    moved: float
    detected: float | None = None
    accepted: bool = True
    detected_after: float | None = None

    GROWN: ClassVar[tuple[str, ...]] = ("detected_after",)


class Detection(_Frozen):
    """What stands behind every ``detected`` share: pictures from derived embeddings, and what names what they show.

    ``detector`` is its kind and how it decides; ``fingerprint`` the SHA-256 over its weights and settings, wherever
    they lie. A picture counts where the detector names one of ``labels``, not one of ``others``. There is one picture
    of each of ``concepts`` (some of many, evenly spread) for each of ``seeds``: ``pictures`` for every share.
    """

    detector: str
    fingerprint: str
    labels: tuple[str, ...]
    others: tuple[str, ...]
    concepts: tuple[str, ...] = ()
    pictures: int = 0
    seeds: tuple[int, ...]
    scheduler: str
    num_inference_steps: int
    guidance_scale: float


class StopRule(_Frozen):
    """Who ended the run of ``epochs: auto``, by which thresholds: ``excise.edit.auto_epochs`` says how.

    ``gain`` is the rise of the margin below which an epoch isn't worth any movement of what is kept, where the margin
    alone decides; ``most`` the number of epochs that are tried.
    """

    judge: Literal["margin", "detector"]
    gain: float
    most: int


class TrainingFigures(_Frozen):
    """How the run of a method that trains went.

    ``loss_before`` and ``loss_after`` are means over the first and the last tenth of the ``iterations``;
    ``share_of_parameters`` is the part of the denoiser's parameters in weights that moved.
    """

    iterations: int
    loss_before: float
    loss_after: float
    share_of_parameters: float


class EditMetadata(_Grown):
    """Everything that made the edit, as stored in the file.

    ``recipe`` is the whole resolved recipe. ``on`` names the edits that the model carried already, in order. ``parts``
    are the edits that a stack was made of, in order, by id. ``source`` describes an imported checkpoint. ``detection``
    and ``stop_rule`` stand behind the stages where there was a detector, or where ``epochs`` was auto; ``training``
    is there where the method trains.
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
    detection: Detection | None = None
    stop_rule: StopRule | None = None
    training: TrainingFigures | None = None

    GROWN: ClassVar[tuple[str, ...]] = ("detection", "stop_rule", "training")
