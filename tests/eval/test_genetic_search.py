"""Selection, crossover and mutation as published, and a fitness that is never computed twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from excise.eval.genetic_search import (
    REMEMBERED,
    Generation,
    GeneticSettings,
    Ids,
    Losses,
    RememberedFitness,
    crossed,
    generations,
    mutated,
)

ALPHABET = np.arange(1, 30)
AIM = np.array([3, 1, 4, 1, 5, 9])


def misses(rows: Ids, bound: float) -> Losses:
    """How far from ``AIM``, exactly."""
    return np.abs(rows - AIM).sum(1).astype(np.float64)


def given_up(rows: Ids, bound: float) -> Losses:
    """The same, but no more than is needed to see that it is above the bound."""
    exact = misses(rows, bound)
    return np.where(exact > bound, np.nextafter(bound, math.inf), exact)


class Counting:
    """Remembers the rows that it was asked for."""

    def __init__(self, fitness: Callable[[Ids, float], Losses]) -> None:
        self._fitness = fitness
        self.rows: list[tuple[int, ...]] = []

    def __call__(self, rows: Ids, bound: float) -> Losses:
        self.rows += map(tuple, rows.tolist())
        return self._fitness(rows, bound)


def searched(fitness: Callable[[Ids, float], Losses], seed: int = 0, batch: int = 7) -> list[Generation]:
    settings = GeneticSettings(population=40, generations=60)
    return list(generations(RememberedFitness(fitness, batch_size=batch), ALPHABET, len(AIM), settings, seed))


def test_the_published_budget_is_the_default() -> None:
    settings = GeneticSettings()
    assert (settings.population, settings.generations) == (200, 3000)
    assert (settings.crossover, settings.mutation, settings.patience) == (0.5, 0.25, None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("population", 41, "41 is odd, and half of it survives: give 40 or 42"),
        ("population", 0, "greater than or equal to 2"),
        ("generations", 0, "greater than or equal to 1"),
        ("mutation", 1.5, "less than or equal to 1"),
        ("crossover", math.nan, "finite|greater than or equal"),
        ("patience", 0, "greater than or equal to 1"),
    ],
)
def test_settings_that_can_not_be(field: str, value: float, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GeneticSettings(**{field: value})


def test_a_search_finds_what_it_looks_for() -> None:
    found = searched(misses)
    assert found[0].lowest > 10
    assert found[-1].lowest <= 2
    assert len(found) == 60
    for one in found:
        assert one.survivors.shape == (20, 6)
        assert np.array_equal(one.losses, np.sort(misses(one.population, 0.0))[:20])
        assert np.array_equal(misses(one.survivors, 0.0), one.losses)


def test_the_same_seed_gives_the_same_search() -> None:
    first, again, other = searched(misses), searched(misses), searched(misses, seed=1)
    assert all(np.array_equal(a.population, b.population) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].population, other[0].population)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_giving_up_early_changes_nothing(batch: int) -> None:
    exact, early = searched(misses), searched(given_up, batch=batch)
    assert all(np.array_equal(a.population, b.population) for a, b in zip(exact, early, strict=True))
    assert all(np.array_equal(a.losses, b.losses) for a, b in zip(exact, early, strict=True))


def test_no_row_is_computed_twice() -> None:
    counting = Counting(misses)
    found = searched(counting)
    # Only a row above an earlier bound may be asked for again, where the bound has risen.
    assert len(counting.rows) < 1.02 * len(set(counting.rows))
    distinct = {tuple(row) for one in found for row in one.population.tolist()}
    assert set(counting.rows) <= distinct
    assert len(counting.rows) < sum(len(one.population) for one in found) / 2


def test_losses_of_a_population_with_equals() -> None:
    counting = Counting(given_up)
    fitness = RememberedFitness(counting, batch_size=2)
    population = np.array([AIM, AIM + 1, AIM, AIM + 2, AIM + 3, AIM + 2])
    losses = fitness(population, 2)
    assert losses[[0, 2]].tolist() == [0, 0]
    assert (np.sort(losses)[:2] == 0).all()
    # The two equal rows are the two best: after the first batch nothing else can be among them.
    assert losses[4] == math.inf
    before = len(counting.rows)
    assert np.array_equal(fitness(population, 2), losses)
    assert len(counting.rows) == before == fitness.evaluated
    # Kept further down, the rows that were given up are looked at again.
    assert fitness(population, 6).tolist() == [0, 6, 0, 12, 18, 12]


def test_what_is_no_number_never_survives() -> None:
    def broken(rows: Ids, bound: float) -> Losses:
        return np.where(rows[:, 0] == 1, math.nan, misses(rows, bound))

    population = np.array([AIM, AIM + 1])
    population[0, 0] = 1
    assert RememberedFitness(broken, batch_size=8)(population, 1).tolist() == [math.inf, 6]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REMEMBERED > 1000
    exact = searched(misses)
    monkeypatch.setattr("excise.eval.genetic_search.REMEMBERED", 50)
    fitness = RememberedFitness(misses, batch_size=7)
    settings = GeneticSettings(population=40, generations=60)
    found = list(generations(fitness, ALPHABET, len(AIM), settings, 0))
    assert all(np.array_equal(a.population, b.population) for a, b in zip(exact, found, strict=True))
    assert len(fitness._exact) + len(fitness._least) < 50 + 3 * 20 + 1


def tagged(count: int, length: int = 8) -> npt.NDArray[np.int64]:
    """Every token says which parent and place it is of."""
    return 100 * np.arange(1, count + 1)[:, None] + np.arange(length)


def test_children_are_two_parents_joined_at_one_point() -> None:
    offspring = crossed(tagged(2000), np.random.default_rng(0), 1.0)
    assert (offspring % 100 == np.arange(8)).all()  # no token changes its place
    families = offspring.reshape(2000, 3, 8) // 100
    cuts = set()
    for number, (parent, first, second) in enumerate(families.tolist(), start=1):
        assert parent == [number] * 8
        partner = second[0] if second[0] != number else first[-1]
        cut = first.count(number) if partner != number else 0
        assert first == [number] * cut + [partner] * (8 - cut)
        assert second == [partner] * cut + [number] * (8 - cut)
        cuts.add(cut)
    assert cuts == set(range(8))  # never after the last token, and at the very start too


def test_half_of_the_parents_are_crossed() -> None:
    offspring = crossed(tagged(2000), np.random.default_rng(0), 0.5)
    assert 2000 + 1800 < len(offspring) < 2000 + 2200
    # All parents are still there, whole.
    assert {tuple(row) for row in tagged(2000).tolist()} <= {tuple(row) for row in offspring.tolist()}


@pytest.mark.parametrize(("rate", "size"), [(0.0, 30), (1.0, 90)])
def test_all_or_none_are_crossed(rate: float, size: int) -> None:
    assert len(crossed(tagged(30), np.random.default_rng(0), rate)) == size


def test_a_mutation_redraws_one_token_of_a_quarter_of_the_rows() -> None:
    before = np.zeros((4000, 8), np.int64)
    after = mutated(before, np.random.default_rng(0), 0.25, ALPHABET)
    assert not before.any()
    changes = (after != before).sum(1)
    assert set(changes.tolist()) == {0, 1}
    assert 900 < changes.sum() < 1100
    assert set((after != before).any(0).tolist()) == {True}
    assert set(after[after > 0].tolist()) == set(ALPHABET.tolist())


def test_the_best_may_be_lost_as_published() -> None:
    lowest = [one.lowest for one in searched(misses)]
    assert any(later > earlier for earlier, later in zip(lowest, islice(lowest, 1, None), strict=False))
