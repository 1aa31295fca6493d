"""The tokens that a search may put in a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from excise.errors import ModelError

#: ``all``, as published, has pieces of words, halves of characters and the special tokens. ``words`` has the tokens
#: that, written alone, are read as themselves: prompts made of them are text that a runtime reads as it was searched.
VocabularyKind = Literal["all", "words"]


@dataclass(frozen=True, eq=False)
class TokenVocabulary:
    """m of a text encoder's tokens."""

    ids: Tensor  #: int64 with shape (m,), ascending
    embeddings: Tensor  #: float32 with shape (m, d_tok)


def token_vocabulary(tokenizer: Any, table: Tensor, kind: VocabularyKind) -> TokenVocabulary:
    """Choose tokens.

    Args:
        tokenizer: transformers' CLIP tokenizer.
        table: all token embeddings, with shape (tokens, d_tok).
        kind: which.

    Raises:
        ModelError: there are none.
    """
    # Rows that no token has can't be written.
    count = min(len(tokenizer), len(table))
    if kind == "all":
        return TokenVocabulary(torch.arange(count, device=table.device), table[:count])
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([one], clean_up_tokenization_spaces=False).strip() for one in range(count)]
    read = tokenizer(texts, truncation=False, verbose=False).input_ids
    words = [one for one in range(count) if one not in special and texts[one] and read[one][1:-1] == [one]]
    if not words:
        raise ModelError("the tokenizer reads none of its tokens as itself: search all of them instead")
    ids = torch.tensor(words, device=table.device)
    return TokenVocabulary(ids, table[ids])
