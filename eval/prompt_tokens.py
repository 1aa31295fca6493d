"""What a search over tokens needs of a CLIP tokenizer: which there are, how they are framed, what text they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from excise.errors import PromptTooLong, UsageError
from excise.eval.attack import Candidate
from excise.eval.token_vocabulary import VocabularyKind, token_vocabulary
from excise.printable import short

#: int64, with the shape that the place names.
Ids: TypeAlias = npt.NDArray[np.int64]


class PromptTokens:
    """A tokenizer and how much its text encoder reads.

    Args:
        tokenizer: transformers' CLIP tokenizer.
        context: positions of a prompt, start and end included.
        rows: of the text encoder's table of token embeddings.
    """

    def __init__(self, tokenizer: Any, *, context: int, rows: int) -> None:
        self._tokenizer, self.context = tokenizer, context
        # Rows that no token has can't be written.
        self._count = min(len(tokenizer), rows)

    @property
    def room(self) -> int:
        """The most tokens between start and end."""
        return self.context - 2

    def alphabet(self, kind: VocabularyKind) -> Ids:
        """The tokens that a search may draw, with shape (m,).

        ``all`` is every token but 0 and the special ones, as published: 1 to 49405 of Stable Diffusion 1. ``words`` is
        that of ``token_vocabulary``.
        """
        if kind == "words":
            return token_vocabulary(self._tokenizer, torch.empty(self._count, 0), kind).ids.numpy()
        special = {0, *self._tokenizer.all_special_ids}
        return np.array([one for one in range(self._count) if one not in special], np.int64)

    def check_room(self, tokens: int) -> None:
        """Check that so many tokens fit between start and end.

        Raises:
            UsageError: they don't.
        """
        if tokens > self.room:
            raise UsageError(
                f"tokens = {tokens}, where the text encoder reads {self.context} with start and end: "
                f"give 1 to {self.room} (the paper's K = 77 is 75)"
            )

    def framed(self, tokens: Ids) -> Ids:
        """Start, the tokens (n, K), end, and padding as the pipeline pads: with shape (n, context).

        Stable Diffusion 1 pads with its end token, as the published search does.
        """
        ids = np.full((len(tokens), self.context), self._tokenizer.pad_token_id, np.int64)
        ids[:, 0], ids[:, 1 : 1 + tokens.shape[1]] = self._tokenizer.bos_token_id, tokens
        ids[:, 1 + tokens.shape[1]] = self._tokenizer.eos_token_id
        return ids

    def read(self, prompts: Sequence[str], *, truncate: bool = False) -> Ids:
        """Prompts as a pipeline reads them, with shape (n, context).

        Args:
            prompts: at least one.
            truncate: read the first tokens only of a prompt that is too long.

        Raises:
            PromptTooLong: a prompt has more tokens than the text encoder reads, and ``truncate`` isn't set.
        """
        for prompt in prompts:
            if not truncate and (length := len(self.tokenize(prompt)) + 2) > self.context:
                raise PromptTooLong(
                    f"{short(prompt)} has {length} tokens, where the text encoder reads {self.context}: shorten it"
                )
        read = self._tokenizer(list(prompts), padding="max_length", max_length=self.context, truncation=True)
        return np.array(read.input_ids, np.int64)

    def tokenize(self, prompt: str) -> tuple[int, ...]:
        """A prompt's token ids, without start, end and padding; any number of them."""
        return tuple(self._tokenizer(prompt, truncation=False, verbose=False).input_ids[1:-1])

    def candidate(self, ids: Sequence[int]) -> Candidate:
        """The text of token ids, nothing tidied up in it."""
        ids = tuple(int(one) for one in ids)
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Candidate(prompt=text, token_ids=ids)

    def survives(self, candidate: Candidate) -> bool:
        """Whether a candidate's text gives the very tokens again that were searched."""
        return self.tokenize(candidate.prompt) == candidate.token_ids

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate's text is short enough to be sent: 16 tokens' text may be more than 16 tokens."""
        return len(self.tokenize(candidate.prompt)) <= self.room
