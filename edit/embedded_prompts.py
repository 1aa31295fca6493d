"""A recipe's prompts as one model embeds them: concepts with their targets, and the statistics of what is kept.

Prompts go through the text encoder a chunk at a time, so that memory doesn't grow with their number; a second pass
reads the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from excise.edit.cache import CachedEncoder, batched
from excise.edit.text import Embedding
from excise.edit.tokens import Concept

#: Prompts embedded, and held, at a time.
CHUNK = 256

#: Of up to so many concepts every token is certified; of more, each one's last subject token, up to ``SUBJECTS``.
WHOLE, SUBJECTS = 16, 1000

Embedded = Mapping[str, tuple[Embedding, ...]]


class EmbeddedPrompts:
    """Concepts and kept prompts, stream by stream.

    Args:
        encoder: embeds.
        pairs: concepts and targets; an empty target means ``" "``, as published.
        kept: makes an iterator over the prompts that are kept.
    """

    def __init__(
        self,
        encoder: CachedEncoder[Embedding],
        pairs: Sequence[tuple[str, str]],
        kept: Callable[[], Iterator[str]],
    ) -> None:
        self._encoder, self._pairs, self._kept = encoder, pairs, kept
        self._recent: dict[str, Embedded] = {}

    def concepts(self, stream: str) -> Iterator[Concept]:
        """What is erased, one ``Concept`` for each segment of the stream."""
        for concept, target in self._embedded_pairs():
            yield from _concepts_of(concept, target, stream)

    def null(self, stream: str) -> Tensor:
        """Tokens of the empty prompt, all segments, with shape (t, d)."""
        return _tokens(self._embed([""])[0], stream)

    def kept(self, stream: str) -> Iterator[Tensor]:
        """Tokens (n, d) of each kept prompt."""
        for chunk in batched(self._kept(), CHUNK):
            for embedded in self._embed(chunk):
                yield _tokens(embedded, stream)

    def kept_grams(self) -> tuple[dict[str, Tensor], int]:
        """``PᵀP`` of all kept prompts with shape (d, d), float64, by stream, and how many prompts there are."""
        passes = 0

        def read() -> Iterator[str]:
            # The first pass names the prompts, the second embeds them.
            nonlocal passes
            passes += 1
            return iter(tqdm(self._kept(), desc="kept prompts", unit="", delay=2, disable=passes == 1))

        found = self._encoder.kept_gram(read)
        return {stream: torch.from_numpy(gram) for stream, gram in found.streams.items()}, found.count

    def certified(self, stream: str) -> tuple[tuple[tuple[str, int], ...], Tensor]:
        """What margins are measured on: the concepts with their numbers of tokens, and the tokens (n, d)."""
        whole = len(self._pairs) <= WHOLE
        named: list[tuple[str, int]] = []
        parts: list[Tensor] = []
        for (name, _), (concept, target) in zip(islice(self._pairs, SUBJECTS), self._embedded_pairs(), strict=False):
            found = list(_concepts_of(concept, target, stream))
            tokens = [c.tokens if whole else c.tokens[max(0, c.tokens_length - 2)][None] for c in found]
            named.append((name, sum(map(len, tokens))))
            parts.extend(tokens)
        return tuple(named), torch.cat(parts)

    def _embedded_pairs(self) -> Iterator[tuple[Embedded, Embedded]]:
        with tqdm(desc="concepts", total=len(self._pairs), unit="", delay=2) as bar:
            for chunk in batched(self._pairs, CHUNK // 2):
                prompts = list(dict.fromkeys(prompt or " " for pair in chunk for prompt in pair))
                embedded = dict(zip(prompts, self._embed(prompts), strict=True))
                for concept, target in chunk:
                    yield embedded[concept], embedded[target or " "]
                bar.update(len(chunk))

    def _embed(self, prompts: Sequence[str]) -> list[Embedded]:
        """Embeddings in order. The last ones are held: recipes of few concepts pass over them several times."""
        wanted = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in wanted if prompt not in self._recent]
        if len(self._recent) + len(missing) > 2 * CHUNK:
            self._recent = {prompt: self._recent[prompt] for prompt in wanted if prompt in self._recent}
        self._recent.update(zip(missing, self._encoder.embed(missing), strict=True))
        return [self._recent[prompt] for prompt in prompts]


def _concepts_of(concept: Embedded, target: Embedded, stream: str) -> Iterator[Concept]:
    for source, aim in zip(concept[stream], target[stream], strict=True):
        yield Concept(source.tokens, aim.tokens, source.length, aim.length, source.start)


def _tokens(embedded: Embedded, stream: str) -> Tensor:
    return torch.cat([segment.tokens for segment in embedded[stream]])
