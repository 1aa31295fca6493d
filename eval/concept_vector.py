"""A concept's direction in the space of text embeddings: ``v = mean(emb(p⁺) − emb(p⁻))``.

Tsai et al., *Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?*, ICLR 2024,
arXiv 2310.10012, eq. 2; github.com/chiayi-hsu/Ring-A-Bell at e4585ad. p⁺ and p⁻ differ in the concept alone, and the
mean is taken over the pairs, position by position: v has a row for each of the text encoder's positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from excise import __version__
from excise.errors import ArtefactError, FingerprintMismatch, NumericsError, UsageError
from excise.eval.attack import PromptEmbedding
from excise.eval.concept_pairs import PromptPair
from excise.eval.text_embedder import Embeddings, TextEmbedder
from excise.manifest import first_problem
from excise.output import new_file
from excise.printable import printable

_TENSOR, _DOCUMENT = "vector", "excise"


class VectorMetadata(BaseModel):
    """What a concept vector was made of. The prompts' digest tells two sets apart without repeating them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    concept: str
    text_encoder: str | None = None  #: the embedder's fingerprint; None of a published file, which doesn't say
    pairs: Annotated[int, Field(ge=0)] = 0  #: 0 of a published file
    pairs_sha256: str | None = None  #: over all prompts, in order
    excise: str = __version__


@dataclass(frozen=True, eq=False)
class ConceptVector:
    """v and where it is from.

    Raises:
        UsageError: ``values`` of another shape.
        NumericsError: inf or nan in them.
    """

    values: PromptEmbedding  #: (t, d)
    metadata: VectorMetadata

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise UsageError(f"a concept vector of shape {self.values.shape}: give (tokens, d)")
        if not np.isfinite(self.values).all():
            raise NumericsError("the concept vector holds inf or nan: embed the pairs in float32")

    def check(self, embedder: TextEmbedder) -> None:
        """Check that it is of this text encoder.

        Raises:
            FingerprintMismatch: it is another's.
        """
        if self.metadata.text_encoder not in (None, embedder.fingerprint):
            raise FingerprintMismatch(
                f"the concept vector of {printable(self.metadata.concept)} was made with text encoder "
                f"{str(self.metadata.text_encoder)[:12]}, this is {embedder.fingerprint[:12]}: make it with this one"
            )

    def added_to(self, embeddings: Embeddings, eta: float) -> Embeddings:
        """``embeddings + ηv``, float32, for embeddings (t, d) or (n, t, d).

        Raises:
            UsageError: embeddings of another shape, or η isn't finite.
        """
        if not np.isfinite(eta):
            raise UsageError(f"eta = {eta}: give a finite number, such as the published 3 for nudity, 0.9 for Van Gogh")
        if embeddings.shape[-2:] != self.values.shape:
            raise UsageError(
                f"the concept vector has shape {self.values.shape}, embeddings {embeddings.shape[-2:]}: "
                "make it with this text encoder"
            )
        return embeddings + np.float32(eta) * self.values


def concept_vector(embedder: TextEmbedder, pairs: Sequence[PromptPair], concept: str) -> ConceptVector:
    """v of pairs, all of the same weight; sums in float64.

    Args:
        embedder: the unedited model's.
        pairs: such as ``read_pairs`` or ``template_pairs`` gives.
        concept: what the vector is called.

    Raises:
        UsageError: no pairs.
        PromptTooLong: a prompt has more tokens than the text encoder reads.
        NumericsError: an embedding isn't finite.
    """
    if not pairs:
        raise UsageError("no pair of prompts: give at least one prompt with the concept and one without")
    tokens, digest = embedder.tokens, hashlib.sha256()
    total = np.zeros(embedder.embed(tokens.read([""])).shape[1:])
    for start in range(0, len(pairs), embedder.batch_size):
        batch = pairs[start : start + embedder.batch_size]
        for one in batch:
            digest.update(json.dumps([one.shown, one.absent]).encode())
        shown = embedder.embed(tokens.read([one.shown for one in batch]))
        absent = embedder.embed(tokens.read([one.absent for one in batch]))
        total += shown.sum(0, dtype=np.float64) - absent.sum(0, dtype=np.float64)
    metadata = VectorMetadata(
        concept=concept, text_encoder=embedder.fingerprint, pairs=len(pairs), pairs_sha256=digest.hexdigest()
    )
    return ConceptVector((total / len(pairs)).astype(np.float32), metadata)


def save_vector(path: Path, vector: ConceptVector) -> None:
    """Write a new ``.safetensors`` file.

    Raises:
        OutputError: there is a file of that name already, or it can't be written.
    """
    with new_file(path) as partial:
        save_file({_TENSOR: vector.values}, partial, metadata={_DOCUMENT: vector.metadata.model_dump_json()})


def load_vector(path: Path) -> ConceptVector:
    """What ``save_vector`` wrote, or a ``.npy`` as the published repository has them, which names no text encoder.

    Raises:
        ArtefactError: there is no such file, or it holds something else.
        NumericsError: inf or nan in it.
    """
    shown = printable(path)
    try:
        if path.suffix == ".npy":
            values, text = np.load(path, allow_pickle=False), VectorMetadata(concept=path.stem).model_dump_json()
        else:
            with safe_open(path, "numpy") as file:
                values, text = file.get_tensor(_TENSOR), (file.metadata() or {}).get(_DOCUMENT, "")
        metadata = VectorMetadata.model_validate_json(text)
    except ValidationError as error:
        raise ArtefactError(f"{shown} is no concept vector of this version: {first_problem(error)}") from error
    except (OSError, SafetensorError, ValueError, EOFError) as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise ArtefactError(f"{shown} can't be read as a concept vector: {reason}") from error
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or values.dtype.kind != "f":
        raise ArtefactError(f"{shown} has {values.dtype} of shape {values.shape}: a concept vector is (tokens, d)")
    return ConceptVector(values.astype(np.float32), metadata)
