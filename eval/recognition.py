"""Whether a classifier saw in images what their prompts asked for: top-1 and top-5, by class and by group.

For an erased class a low share is good, for a kept one a high one (the paper's ``Acc_e`` and ``Acc_u``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Tally:
    """``hits`` of ``n`` images."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.n


def check_labels(wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``UsageError`` if the classifier doesn't know a label: it would never be seen, as if it were erased."""
    names = {one.casefold() for one in known}
    if unknown := sorted({one for one in wanted if one.casefold() not in names}):
        raise UsageError(f"the classifier doesn't know {', '.join(map(repr, unknown))}")


def seen(observation: Mapping[str, Any], labels: Iterable[str], top: int = 1) -> bool:
    """Whether any of ``labels`` is among the ``top`` best ones of one image. Capitals don't tell labels apart.

    Raises:
        UsageError: ``top`` is below 1, or the observation doesn't go that far.
    """
    best = observation["labels"]
    if not 1 <= top <= len(best):
        raise UsageError(f"top-{top} can't be told from the {len(best)} best labels of an image")
    wanted = {one.casefold() for one in labels}
    return any(one.casefold() in wanted for one in best[:top])


def hits(observations: Sequence[Mapping[str, Any]], labels: Sequence[str], top: int = 1) -> npt.NDArray[np.bool_]:
    """Whether each image's own label is among its ``top`` best ones, (n,).

    Raises:
        UsageError: another number of labels than images, or as ``seen``.
    """
    if len(observations) != len(labels):
        raise UsageError(f"{len(observations)} images can't have {len(labels)} labels")
    pairs = zip(observations, labels, strict=True)
    return np.array([seen(observation, (label,), top) for observation, label in pairs], np.bool_)


def tally(found: npt.NDArray[np.bool_], keys: Sequence[Key]) -> dict[Key, Tally]:
    """Hits by key, such as each image's class or group, in the order in which keys first come.

    Raises:
        UsageError: another number of keys than images.
    """
    if len(found) != len(keys):
        raise UsageError(f"{len(found)} images can't have {len(keys)} keys")
    tallies: dict[Key, Tally] = {}
    for one, key in zip(found.tolist(), keys, strict=True):
        before = tallies.get(key, Tally(0, 0))
        tallies[key] = Tally(before.hits + one, before.n + 1)
    return tallies
