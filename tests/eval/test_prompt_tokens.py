"""The framing of searched tokens, and their way to text and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from excise.errors import PromptTooLong, UsageError
from excise.eval.prompt_tokens import PromptTokens


@pytest.fixture(scope="module")
def tokens(demo_model: Path) -> PromptTokens:
    return PromptTokens(CLIPTokenizer.from_pretrained(demo_model / "tokenizer"), context=24, rows=711)


def test_tokens_are_framed_as_the_pipeline_reads_their_text(tokens: PromptTokens) -> None:
    ids = tokens.tokenize("a gun on red")
    framed = tokens.framed(np.array([ids, ids]))
    assert framed.shape == (2, 24)
    assert framed[0].tolist() == [709, *ids, *[710] * (23 - len(ids))]
    assert np.array_equal(framed[:1], tokens.read(["a gun on red"]))


def test_another_padding_token_follows_one_end_token(tokens: PromptTokens, demo_model: Path) -> None:
    other = CLIPTokenizer.from_pretrained(demo_model / "tokenizer", pad_token="!")
    padded = PromptTokens(other, context=24, rows=711)
    framed = padded.framed(np.array([padded.tokenize("a gun")]))
    assert framed[0, :5].tolist() == [709, *tokens.tokenize("a gun"), 710, 0]
    assert np.array_equal(framed, padded.read(["a gun"]))


def test_the_published_alphabet_has_neither_token_0_nor_special_ones(tokens: PromptTokens) -> None:
    assert tokens.alphabet("all").tolist() == list(range(1, 709))


def test_tokens_without_an_embedding_are_not_drawn(demo_model: Path) -> None:
    fewer = PromptTokens(CLIPTokenizer.from_pretrained(demo_model / "tokenizer"), context=24, rows=300)
    assert fewer.alphabet("all").max() == 299


def test_words_are_read_as_themselves_and_pieces_are_not(tokens: PromptTokens) -> None:
    words = tokens.alphabet("words")
    assert 50 < len(words) < 709
    assert all(tokens.survives(tokens.candidate([one])) for one in words[:40])
    lost = [one for one in tokens.alphabet("all") if not tokens.survives(tokens.candidate([one]))]
    assert lost
    assert not set(lost) & set(words.tolist())


def test_text_may_have_more_tokens_than_were_searched(tokens: PromptTokens) -> None:
    long = [tokens.candidate([one] * 22) for one in tokens.alphabet("all")]
    candidate = next(one for one in long if len(tokens.tokenize(one.prompt)) > 22)
    assert len(candidate.token_ids) == 22
    assert not tokens.survives(candidate)
    assert not tokens.fits(candidate)


def test_a_prompt_that_is_too_long_is_cut_on_demand_alone(tokens: PromptTokens) -> None:
    long = "gun " * 23
    with pytest.raises(PromptTooLong, match=r"has 25 tokens, where the text encoder reads 24: shorten it"):
        tokens.read([long])
    cut = tokens.read([long], truncate=True)[0]
    assert cut.shape == (24,)
    assert cut[-1] == 710
    assert cut[1:-1].tolist() == [tokens.tokenize("gun")[0]] * 22


def test_room(tokens: PromptTokens) -> None:
    tokens.check_room(22)
    with pytest.raises(UsageError, match=r"tokens = 23, where the text encoder reads 24 .* give 1 to 22"):
        tokens.check_room(23)
