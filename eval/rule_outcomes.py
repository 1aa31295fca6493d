"""What a protocol's counting rules find in every image, from what its detectors saw in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.boxes import boxes_of
from excise.eval.cases import ERASED, KEPT, Case
from excise.eval.counting import CountingRule, parts
from excise.eval.protocol_schema import AnyKindOfRule, AnyRule, BoxRule, ClassRule, Detector, LabelRule

#: Detector's name → one observation an image, as ``ImageDetector.observe`` gives it.
Observations = Mapping[str, Sequence[Mapping[str, Any]]]

_TOP = 5


@dataclass(frozen=True)
class Outcome:
    """One figure's count in every image of its group.

    Attributes:
        name: Of the figure, ``nude_parts.RECE``.
        group: Whose images count; None all.
        counts: Of all images with shape (n,), those of other groups included.
        binary: Whether each image counts once or not at all.
        per_class: Class → counts of all images, for rules of boxes.
        better: Which way is good.
    """

    name: str
    group: str | None
    counts: npt.NDArray[np.int64]
    binary: bool
    per_class: Mapping[str, npt.NDArray[np.int64]]
    better: str = "lower"


def outcomes(
    rules: Sequence[AnyKindOfRule], detectors: Sequence[Detector], seen: Observations, cases: Sequence[Case]
) -> list[Outcome]:
    """Every rule's figures, in the protocol's order.

    Raises:
        UsageError: a rule counts a class that its detector can't name.
    """
    found: list[Outcome] = []
    by_rule: dict[str, Outcome] = {}
    groups = {case.group for case in cases}
    # Counts are of what was erased; a protocol without such prompts counts in all of its images.
    group = ERASED if ERASED in groups else None
    for rule in rules:
        if isinstance(rule, AnyRule):
            counts = np.any([by_rule[name].counts > 0 for name in rule.any_of], axis=0).astype(np.int64)
            made = [Outcome(rule.measures()[0], group, counts, True, {})]
        else:
            looked = seen[rule.detector or detectors[0].name]
            made = _single(rule, looked, cases, group)
        found += made
        by_rule[rule.name] = made[0]
    return found


def _single(
    rule: BoxRule | ClassRule | LabelRule, looked: Sequence[Mapping[str, Any]], cases: Sequence[Case], group: str | None
) -> list[Outcome]:
    if isinstance(rule, BoxRule):
        counting = CountingRule(rule.name, rule.classes, rule.threshold, once_per_class=rule.count != "every_box")
        rows = [parts(boxes_of(one), counting) for one in looked]
        per_class = {name: np.array([row[name] for row in rows], np.int64) for name in rule.classes}
        counts = np.sum(list(per_class.values()), axis=0).astype(np.int64)
        if rule.count == "image":
            return [Outcome(rule.measures()[0], group, (counts > 0).astype(np.int64), True, {})]
        return [Outcome(rule.measures()[0], group, counts, False, per_class)]
    tops = [_top(one, rule.top) for one in looked]
    if isinstance(rule, ClassRule):
        wanted = {name.casefold() for name in rule.classes}
        counts = np.array([bool(wanted & top) for top in tops], np.int64)
        return [Outcome(rule.measures()[0], group, counts, True, {})]
    erased = {case.label.casefold() for case in cases if case.group == ERASED and case.label}
    detected = np.array([bool(erased & top) for top in tops], np.int64)
    own = np.array([(case.label or "").casefold() in top for case, top in zip(cases, tops, strict=True)], np.int64)
    names = rule.measures()
    both = [Outcome(names[0], ERASED, detected, True, {}), Outcome(names[1], KEPT, own, True, {}, better="higher")]
    groups = {case.group for case in cases}
    return [one for one in both if one.group in groups]


def _top(observation: Mapping[str, Any], count: int) -> set[str]:
    labels = observation["labels"]
    if len(labels) < count and count > _TOP:
        raise UsageError(f"a rule asks for the {count} best labels, and detectors name {len(labels)}")
    return {label.casefold() for label in labels[:count]}


def in_words(seen: Observations, index: int, *, best: int = 3) -> tuple[str, ...]:
    """What the detectors saw in one image, for people, such as ``BELLY_EXPOSED 0.71``."""
    words: list[str] = []
    for looked in seen.values():
        one = looked[index]
        if "boxes" in one:
            words += [f"{box.name} {box.score:.2f}" for box in boxes_of(one)[:best]]
        else:
            words.append(f"{one['labels'][0]} {one['probabilities'][0]:.2f}")
    return tuple(words)
