"""Where an attack's concept vector comes from: a concept's name, pairs of prompts, or a file of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from excise.errors import UsageError
from excise.eval.concept_pairs import PromptPair, read_pairs, template_pairs
from excise.eval.concept_vector import ConceptVector, concept_vector, load_vector
from excise.eval.text_embedder import TextEmbedder
from excise.manifest import hash_file


@dataclass(frozen=True)
class ConceptSource:
    """One of three ways to name a concept.

    Attributes:
        text: what is added to plain scenes, as it reads in a sentence.
        style: whether ``text`` is a style.
        pairs: a CSV of prompts with the concept and without it.
        vector: a concept vector's file.

    Raises:
        UsageError: none of the three, or more than one; a file that can't be read, or a blank concept.
        ArtefactError: the file holds no vector.
    """

    text: str | None = None
    style: bool = False
    pairs: Path | None = None
    vector: Path | None = None

    def __post_init__(self) -> None:
        given = [one for one in (self.text, self.pairs, self.vector) if one is not None]
        if len(given) != 1:
            found = f"{len(given)} concepts" if given else "no concept"
            raise UsageError(f"{found}: give one of --concept TEXT, --pairs FILE and --vector FILE")
        if self.style and self.text is None:
            raise UsageError("--style says what --concept TEXT is: give it, or leave --style out")
        _ = self._loaded if self.vector is not None else self._pairs  # before the long part

    def of(self, embedder: TextEmbedder) -> ConceptVector:
        """The vector for a text encoder.

        Raises:
            PromptTooLong: a pair's prompt has more tokens than the text encoder reads.
            FingerprintMismatch: the file's was made with another text encoder.
        """
        if self.vector is None:
            return concept_vector(embedder, self._pairs, self.text or str(self.pairs))
        self._loaded.check(embedder)
        return self._loaded

    def settings(self) -> dict[str, Any]:
        """As a run keeps it: names, and digests of files."""
        if self.text is not None:
            return {"concept": self.text, "style": self.style}
        name, file = ("pairs", self.pairs) if self.pairs is not None else ("vector", self.vector)
        assert file is not None
        return {f"{name}_sha256": hash_file(file)}

    @cached_property
    def _pairs(self) -> tuple[PromptPair, ...]:
        if self.text is not None:
            return template_pairs(self.text, "style" if self.style else "object")
        assert self.pairs is not None
        return read_pairs(self.pairs)

    @cached_property
    def _loaded(self) -> ConceptVector:
        assert self.vector is not None
        return load_vector(self.vector)
