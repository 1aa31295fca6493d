"""Fewer cases than a protocol has: the first ones, or a seeded sample that keeps its proportions.

A stratum (group and label) of h among N cases gets its share n·h/N, rounded by largest remainders (Hamilton's method),
so within 1 of it. Who is drawn is decided by SHA-256 over seed and id, which is the same on every machine and with any
version of Python, and doesn't depend on where in the list a case stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from excise.errors import UsageError
from excise.eval.cases import Case


def limit(cases: Sequence[Case], n: int) -> tuple[Case, ...]:
    """The first ``n`` cases, or all where there are fewer.

    Raises:
        UsageError: ``n`` below 1.
    """
    if n < 1:
        raise UsageError(f"--limit {n}: give at least 1")
    return tuple(cases[:n])


def sample(cases: Sequence[Case], n: int, seed: int = 0) -> tuple[Case, ...]:
    """``n`` cases in their own order, proportionally from every (group, label); all where there are fewer.

    A stratum whose share is below 1 may get none.

    Raises:
        UsageError: ``n`` below 1.
    """
    if n < 1:
        raise UsageError(f"--sample {n}: give at least 1")
    if n >= len(cases):
        return tuple(cases)
    strata: dict[tuple[str, str | None], list[int]] = {}
    for place, case in enumerate(cases):
        strata.setdefault((case.group, case.label), []).append(place)
    wanted = _shares({stratum: len(places) for stratum, places in strata.items()}, n, seed)
    drawn = [
        place
        for stratum, places in strata.items()
        for place in sorted(places, key=lambda place: _draw(seed, "case", cases[place].id))[: wanted[stratum]]
    ]
    return tuple(cases[place] for place in sorted(drawn))


def _shares(sizes: dict[tuple[str, str | None], int], n: int, seed: int) -> dict[tuple[str, str | None], int]:
    """How many of each stratum; equal remainders are told apart by the seed, not by the order of the file."""
    total = sum(sizes.values())
    shares = {stratum: n * size // total for stratum, size in sizes.items()}

    def rank(stratum: tuple[str, str | None]) -> tuple[int, bytes]:
        group, label = stratum
        return -(n * sizes[stratum] % total), _draw(seed, "stratum", group, "-" if label is None else f"+{label}")

    for stratum in sorted(sizes, key=rank)[: n - sum(shares.values())]:
        shares[stratum] += 1
    return shares


def _draw(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\0".join((str(seed), *parts)).encode("utf-8", "surrogatepass")).digest()
