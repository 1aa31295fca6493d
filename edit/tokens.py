"""Which token of a concept becomes which token of its target: the rows of ``C`` and ``C*``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from excise.edit.cholesky import is_finite
from excise.errors import NumericsError, UsageError


@dataclass(frozen=True)
class Concept:
    """A concept to erase and what takes its place, as the text encoder puts them out.

    Attributes:
        tokens: the concept at every position, with shape (t, d).
        target: the target at every position, with shape (t, d).
        tokens_length: ``attention_mask.sum()`` of the concept's prompt, start and end tokens included; 1 where a
            prompt has one embedding only (pooled), or nothing but its end token.
        target_length: the same for the target's prompt.
        start: positions before a prompt's own tokens: 1 where the tokenizer has a start token (CLIP), 0 where it has
            none (T5) or a prompt has one embedding only.

    Raises:
        UsageError: the shapes differ, a length isn't from 1 to t, or a start isn't from 0 to t − 1.
        NumericsError: an embedding holds inf or nan.
    """

    tokens: Tensor
    target: Tensor
    tokens_length: int
    target_length: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape != self.target.shape:
            shapes = f"{tuple(self.tokens.shape)} and {tuple(self.target.shape)}"
            raise UsageError(f"a concept of shapes {shapes}: give the same (t, d) for tokens and target")
        rows(self.tokens, self.tokens.shape[1])
        rows(self.target, self.target.shape[1])
        for name, length in (("tokens_length", self.tokens_length), ("target_length", self.target_length)):
            if not 1 <= length <= len(self.tokens):
                raise UsageError(f"{name} = {length}: give the attention mask's sum, from 1 to {len(self.tokens)}")
        if not 0 <= self.start < len(self.tokens):
            raise UsageError(f"start = {self.start}: give the number of start tokens, 0 or 1")

    @property
    def dim(self) -> int:
        """d, the width of the text encoder's output."""
        return self.tokens.shape[1]


Rule = Callable[[Concept], tuple[Tensor, Tensor]]


def last_subject_pairs(concept: Concept) -> tuple[Tensor, Tensor]:
    """``C`` and ``C*`` with shape (m, d): from the last token before the end of text to the last position.

    The rule of UCE's training script in the published RECE code (ECCV 2024, arXiv 2407.12383): each slice starts at
    ``attention_mask.sum() − 2``, and the longer one loses its last rows. An empty prompt starts at its start token, or
    at its end token where the tokenizer has no start token (T5).
    """
    first, first_target = max(0, concept.tokens_length - 2), max(0, concept.target_length - 2)
    count = len(concept.tokens) - max(first, first_target)
    return concept.tokens[first : first + count], concept.target[first_target : first_target + count]


def all_pairs(concept: Concept) -> tuple[Tensor, Tensor]:
    """``C`` and ``C*`` with shape (t, d): every position, one by one, the start token included."""
    return concept.tokens, concept.target


#: By the names that the command line and the edit file use.
RULES: Mapping[str, Rule] = MappingProxyType({"last-subject": last_subject_pairs, "all": all_pairs})


#: The most that a float32 text encoder's rounding makes of its embeddings' Frobenius norm. Measured against the same
#: encoder in float64: 5.4·10⁻⁷ (CLIP ViT-L's shapes, random weights) and 2.6·10⁻⁷ (the demo's), of 9.5·10⁻⁷ here.
ROUNDING = 8 * torch.finfo(torch.float32).eps


def rows(tokens: Tensor, dim: int) -> Tensor:
    """``tokens`` with shape (n, dim) as float64, detached.

    Raises:
        UsageError: another shape.
        NumericsError: inf or nan.
    """
    if tokens.ndim != 2 or tokens.shape[1] != dim:
        raise UsageError(f"embeddings of shape {tuple(tokens.shape)}: give (tokens, {dim})")
    if not is_finite(tokens):
        raise NumericsError("an embedding holds inf or nan: load the text encoder in float32")
    return tokens.detach().to(torch.float64)


def rank(values: Tensor) -> int:
    """How many singular values of a matrix of embeddings aren't what a float32 text encoder's rounding leaves.

    Rounding moves no singular value by more than its own Frobenius norm (Weyl), for which ``ROUNDING`` of the matrix's
    is allowed. The rule of ``numpy.linalg.matrix_rank``, eps · max(shape) of the largest value, takes directions that
    are used for noise: 66 of the 767 that 24 prompts use in CLIP ViT-L's shapes.

    Args:
        values: all of them, with shape (k,).
    """
    return int((values > ROUNDING * values.norm()).sum())


def width(weights: Sequence[Tensor]) -> int:
    """d, which all ``weights`` (o_i × d) must share. Raises ``UsageError`` where they don't."""
    if not weights:
        raise UsageError("no weight to edit: give the K and V projections of the cross-attention layers")
    dim = weights[0].shape[-1]
    for site, weight in enumerate(weights):
        if weight.ndim != 2 or weight.shape[1] != dim:
            raise UsageError(f"weight {site} has shape {tuple(weight.shape)}: give (o, {dim}) like weight 0")
    return dim


def of_width(concepts: Iterable[Concept], dim: int) -> Iterator[Concept]:
    """``concepts``, read once. Raises ``UsageError`` where one isn't d wide, and at the end where there was none."""
    index = -1
    for index, concept in enumerate(concepts):
        if concept.dim != dim:
            raise UsageError(f"concept {index} has width {concept.dim}, weights {dim}: use the model's text encoder")
        yield concept
    if index < 0:
        raise UsageError("no concept to erase: give at least one")
