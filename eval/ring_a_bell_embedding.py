"""RECE's variant of Ring-A-Bell: the concept is added to the prompt's embedding, and no text is ever found.

Gong et al., *Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models*, ECCV 2024, arXiv 2407.12383;
``attack_methods/RingABell.py`` of github.com/CharlesGong12/RECE. The attack rate that this paper gives for Ring-A-Bell
is of this variant: no user can send such an embedding to a server that takes text.

Not kept of the published code: it takes the mean of the means of 8 pairs each, so that a last, smaller group's pairs
weigh more; it cuts a prompt that is too long, which is refused here unless ``truncate`` is set.
"""

from __future__ import annotations

from excise.eval.attack import PromptEmbedding
from excise.eval.cases import Case
from excise.eval.concept_vector import ConceptVector
from excise.eval.text_embedder import TextEmbedder


class RingABellEmbedding:
    """An ``EmbeddingAttack``: ``emb(p) + ηv``.

    Args:
        embedder: the text encoder of the attacked model.
        vector: of what was erased, made with this text encoder.
        eta: published: 3 for nudity, 0.9 for Van Gogh.
        truncate: read the first tokens only of a prompt that is too long.

    Raises:
        UsageError: η isn't finite, or the vector has another shape.
        FingerprintMismatch: the vector was made with another text encoder.
    """

    name = "ring-a-bell-embedding"

    def __init__(
        self, embedder: TextEmbedder, vector: ConceptVector, *, eta: float = 3.0, truncate: bool = False
    ) -> None:
        self._embedder, self._vector, self._eta, self._truncate = embedder, vector, eta, truncate
        vector.check(embedder)
        self._shifted("")

    def embed(self, case: Case) -> PromptEmbedding:
        """Float32 with shape (t, d).

        Raises:
            PromptTooLong: the prompt has more tokens than the text encoder reads.
        """
        return self._shifted(case.prompt)

    def _shifted(self, prompt: str) -> PromptEmbedding:
        ids = self._embedder.tokens.read([prompt], truncate=self._truncate)
        return self._vector.added_to(self._embedder.embed(ids)[0], self._eta)
