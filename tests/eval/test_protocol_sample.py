"""Samples of cases: proportional, in order, and the same wherever they are drawn."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excise.errors import UsageError
from excise.eval.cases import Case
from excise.eval.protocol_sample import limit, sample


def _cases(sizes: dict[tuple[str, str | None], int]) -> tuple[Case, ...]:
    strata = [stratum for stratum, size in sizes.items() for _ in range(size)]
    random.Random(1).shuffle(strata)
    return tuple(Case(str(number), "", number, 7.5, group, label) for number, (group, label) in enumerate(strata))


STRATA = st.dictionaries(
    st.tuples(st.sampled_from(["erased", "kept"]), st.sampled_from([None, "", "None", "a", "b", "c", "d"])),
    st.integers(1, 30),
    min_size=1,
)


@given(STRATA, st.integers(1, 200), st.integers(0, 2**40))
def test_a_sample_is_an_ordered_subset_and_each_stratum_has_its_share(
    sizes: dict[tuple[str, str | None], int], n: int, seed: int
) -> None:
    cases = _cases(sizes)
    drawn = sample(cases, n, seed)
    assert len(drawn) == min(n, len(cases))
    places = [cases.index(case) for case in drawn]
    assert places == sorted(set(places))
    got = Counter((case.group, case.label) for case in drawn)
    for stratum, size in sizes.items():
        share = Fraction(min(n, len(cases)) * size, len(cases))
        assert math.floor(share) <= got[stratum] <= math.ceil(share)


@given(STRATA.filter(lambda sizes: max(sizes.values()) > 15), st.integers(0, 1000))
def test_other_seeds_draw_other_cases(sizes: dict[tuple[str, str | None], int], seed: int) -> None:
    cases = _cases(sizes)
    # There are at least 16 over 8 ways to draw half of the largest stratum: ten draws agree once in 10³⁶.
    draws = {sample(cases, len(cases) // 2, seed + step) for step in range(10)}
    assert len(draws) > 1
    assert sample(cases, len(cases) // 2, seed) == sample(list(cases), len(cases) // 2, seed)


@given(STRATA, st.integers(1, 50), st.integers(0, 99))
def test_the_order_of_the_file_decides_nothing(sizes: dict[tuple[str, str | None], int], n: int, seed: int) -> None:
    cases = _cases(sizes)
    assert set(sample(cases[::-1], n, seed)) == set(sample(cases, n, seed))


def test_every_case_is_as_likely_as_the_next() -> None:
    cases = _cases({("erased", "a"): 10, ("kept", None): 30})
    drawn = Counter(case.id for seed in range(1000) for case in sample(cases, 8, seed))
    # 200 of 1000 draws each, σ = √(1000 · 0.2 · 0.8) = 12.6; five σ is 63. Measured: 179 to 227.
    assert all(abs(drawn[case.id] - 200) < 63 for case in cases)


def test_singletons_share_what_is_left_by_seed() -> None:
    cases = _cases({("erased", str(number)): 1 for number in range(20)})
    drawn = {case.id for seed in range(60) for case in sample(cases, 2, seed)}
    # A case is left out of 60 draws of 2 with probability 0.9⁶⁰ = 0.2 %.
    assert drawn == {case.id for case in cases}


def test_the_same_sample_on_every_machine() -> None:
    # Written down from runs with Python 3.7 to 3.13, which agree.
    cases = [Case(f"c{i}", f"prompt {i}", i, 7.5, *(("kept", "b") if i % 4 else ("erased", None))) for i in range(40)]
    assert [case.seed for case in sample(cases, 10, 0)] == [4, 11, 14, 15, 17, 23, 25, 28, 36, 38]
    assert [case.seed for case in sample(cases, 10, 1)] == [1, 6, 12, 13, 14, 22, 23, 24, 25, 31]


def test_the_first_cases() -> None:
    cases = _cases({("erased", "a"): 5})
    assert limit(cases, 2) == cases[:2]
    assert limit(cases, 9) == cases
    assert sample(cases, 9, 3) == cases


@pytest.mark.parametrize("n", [0, -1])
def test_nothing_can_not_be_asked_for(n: int) -> None:
    with pytest.raises(UsageError, match=f"--limit {n}: give at least 1"):
        limit(_cases({("erased", "a"): 5}), n)
    with pytest.raises(UsageError, match=f"--sample {n}: give at least 1"):
        sample(_cases({("erased", "a"): 5}), n)
