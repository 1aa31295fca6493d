"""Which rows of a concept go to which rows of its target."""

from __future__ import annotations

import pytest
import torch

from excise.edit.tokens import RULES, Concept, all_pairs, last_subject_pairs
from excise.errors import NumericsError, UsageError

T, D = 9, 3
TOKENS = torch.arange(T * D, dtype=torch.float32).reshape(T, D)
TARGET = TOKENS + 100


@pytest.mark.parametrize(
    ("length", "target_length", "rows", "target_rows"),
    [
        (5, 5, [3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]),
        (5, 2, [3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5]),
        (2, 5, [0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8]),
        (9, 2, [7, 8], [0, 1]),
    ],
)
def test_last_subject(length: int, target_length: int, rows: list[int], target_rows: list[int]) -> None:
    tokens, target = last_subject_pairs(Concept(TOKENS, TARGET, length, target_length))
    assert torch.equal(tokens, TOKENS[rows])
    assert torch.equal(target, TARGET[target_rows])


def test_all() -> None:
    tokens, target = all_pairs(Concept(TOKENS, TARGET, 5, 3))
    assert torch.equal(tokens, TOKENS)
    assert torch.equal(target, TARGET)


def test_names() -> None:
    assert dict(RULES) == {"last-subject": last_subject_pairs, "all": all_pairs}


@pytest.mark.parametrize("length", [-1, 0, T + 1])
def test_length_out_of_range(length: int) -> None:
    with pytest.raises(UsageError, match=f"tokens_length = {length}"):
        Concept(TOKENS, TARGET, length, 2)
    with pytest.raises(UsageError, match=f"target_length = {length}"):
        Concept(TOKENS, TARGET, 2, length)


@pytest.mark.parametrize("start", [-1, T])
def test_start_out_of_range(start: int) -> None:
    with pytest.raises(UsageError, match=f"start = {start}"):
        Concept(TOKENS, TARGET, 2, 2, start)


def test_shapes_and_values() -> None:
    with pytest.raises(UsageError, match=r"\(9, 3\) and \(8, 3\)"):
        Concept(TOKENS, TARGET[1:], 2, 2)
    with pytest.raises(UsageError, match="a concept of shapes"):
        Concept(TOKENS[None], TARGET[None], 2, 2)
    with pytest.raises(NumericsError, match="inf or nan"):
        Concept(TOKENS, TARGET / 0, 2, 2)
