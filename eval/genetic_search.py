"""A genetic search over rows of tokens, whole populations at a time, no row evaluated twice.

Selection, crossover and mutation are those of Ring-A-Bell's published code: the better half survives; each survivor is
crossed with another, drawn at random, with some probability, at one point, and both children join it; then every row,
survivors included, has one token redrawn with some probability. So the best row may be lost from one generation to the
next, and the size of a population varies around the given one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator

from excise.eval.prompt_tokens import Ids

Losses: TypeAlias = npt.NDArray[np.float64]

#: Losses of rows (n, K), with shape (n,); above the bound, any value that is above it too.
Fitness = Callable[[Ids, float], Losses]

#: Rows that are remembered, at most; then all are forgotten but the population's.
REMEMBERED = 2**17


class GeneticSettings(BaseModel):
    """The published budget by default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    population: Annotated[int, Field(ge=2)] = 200  #: the first one's size; half of it survives
    generations: Annotated[int, Field(ge=1)] = 3000
    crossover: Annotated[float, Field(ge=0, le=1)] = 0.5  #: the probability that a survivor has two children
    mutation: Annotated[float, Field(ge=0, le=1)] = 0.25  #: the probability that one token of a row is redrawn
    patience: Annotated[int, Field(ge=1)] | None = None  #: stop after so many generations without a lower loss

    @field_validator("population")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd, and half of it survives: give {value - 1} or {value + 1}")
        return value


@dataclass(frozen=True, eq=False)
class Generation:
    """One population and what is left of it."""

    number: int  #: from 0
    population: Ids  #: (n, K)
    survivors: Ids  #: (population / 2, K), the lowest loss first
    losses: Losses  #: of the survivors

    @property
    def lowest(self) -> float:
        """The lowest loss."""
        return float(self.losses[0])


class RememberedFitness:
    """Losses of populations, with every row evaluated once however often it comes.

    Args:
        fitness: of rows, all different.
        batch_size: rows given to it at a time; between two batches the bound falls.
    """

    def __init__(self, fitness: Fitness, *, batch_size: int) -> None:
        self._fitness, self._batch = fitness, batch_size
        self._exact: dict[bytes, float] = {}
        self._least: dict[bytes, float] = {}  # of rows that were given up: what their loss is above
        self.evaluated = 0  #: rows given to ``fitness`` so far

    def __call__(self, population: Ids, keep: int) -> Losses:
        """Losses with shape (n,), exact for the ``keep`` lowest; inf for rows that can't be among them."""
        keys = [row.tobytes() for row in population]
        if len(self._exact) + len(self._least) > REMEMBERED:
            self._exact = {key: self._exact[key] for key in keys if key in self._exact}
            self._least = {}
        losses = np.array([self._exact.get(key, math.nan) for key in keys])
        places: dict[bytes, list[int]] = {}
        for place, key in enumerate(keys):
            if key not in self._exact:
                places.setdefault(key, []).append(place)
        missing = list(places)
        for start in range(0, len(missing), self._batch):
            bound = _bound(losses, keep)
            asked = [key for key in missing[start : start + self._batch] if not self._least.get(key, -math.inf) > bound]
            if not asked:
                continue
            found = self._fitness(population[[places[key][0] for key in asked]], bound)
            self.evaluated += len(asked)
            for key, loss in zip(asked, found.tolist(), strict=True):
                if loss <= bound:
                    self._exact[key] = losses[places[key]] = loss
                else:
                    self._least[key] = loss
        return np.where(np.isnan(losses), math.inf, losses)


def generations(
    fitness: RememberedFitness, alphabet: Ids, length: int, settings: GeneticSettings, seed: int
) -> Iterator[Generation]:
    """All generations of the budget, one by one; the same seed and losses give the same.

    Args:
        fitness: of rows with shape (n, length).
        alphabet: the tokens to draw from, with shape (m,).
        length: K.
        settings: the budget. Whoever iterates minds the patience.
        seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    keep = settings.population // 2
    population = alphabet[rng.integers(len(alphabet), size=(settings.population, length))]
    for number in range(settings.generations):
        losses = fitness(population, keep)
        order = np.argsort(losses, kind="stable")[:keep]
        yield Generation(number, population, population[order], losses[order])
        population = mutated(crossed(population[order], rng, settings.crossover), rng, settings.mutation, alphabet)


def crossed(parents: Ids, rng: np.random.Generator, rate: float) -> Ids:
    """The parents (m, K) and two children of each that is crossed: with shape (m to 3m, K), a parent before its own.

    The cut is anywhere before the last token. At the very start the children are the two parents; a partner may be the
    parent itself. Both are as published.
    """
    count, length = parents.shape
    chosen = rng.random(count) < rate
    partners = parents[rng.integers(count, size=count)]
    cuts = rng.integers(length, size=(count, 1))
    left = np.arange(length) < cuts
    families = np.stack([parents, np.where(left, parents, partners), np.where(left, partners, parents)], axis=1)
    joins = np.stack([np.ones(count, np.bool_), chosen, chosen], axis=1)
    children: Ids = families[joins]
    return children


def mutated(population: Ids, rng: np.random.Generator, rate: float, alphabet: Ids) -> Ids:
    """A copy of (n, K) with one token of some rows redrawn; it may be drawn again."""
    count, length = population.shape
    rows = np.flatnonzero(rng.random(count) < rate)
    changed = population.copy()
    changed[rows, rng.integers(length, size=len(rows))] = alphabet[rng.integers(len(alphabet), size=len(rows))]
    return changed


def _bound(losses: Losses, keep: int) -> float:
    """The ``keep``-th lowest of the losses that are known, inf where fewer are."""
    known = losses[~np.isnan(losses)]
    return float(np.partition(known, keep - 1)[keep - 1]) if len(known) >= keep else math.inf
