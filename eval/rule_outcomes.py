"""What a protocol's counting rules find in every image, from what its detectors saw in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval.boxes import boxes_of
from excise.eval.cases import ERASED, KEPT, Case
from excise.eval.counting import CountingRule, parts
from excise.eval.protocol_schema import AnyKindOfRule, AnyRule, BoxRule, ClassRule, Detector, LabelRule
from excise.eval.recognition import check_labels, hits, seen

#: Detector's name → one observation an image, as ``ImageDetector.observe`` gives it.
Observations = Mapping[str, Sequence[Mapping[str, Any]]]
Counts = npt.NDArray[np.int64]

#: Labels in an observation of a classifier.
TOP = 5


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
        flags: Whether an image that counts is to be blurred: not for objects that prompts ask for by their label.
    """

    name: str
    group: str | None
    counts: Counts
    binary: bool
    per_class: Mapping[str, Counts]
    better: Literal["lower", "higher"] = "lower"
    flags: bool = True

    def counts_in(self, case: Case) -> bool:
        """Whether a case's image is of the figure's group."""
        return self.group in (None, case.group)


def check_rules(
    rules: Sequence[AnyKindOfRule],
    detectors: Sequence[Detector],
    labels: Mapping[str, Sequence[str]],
    labelled: Sequence[Case],
) -> None:
    """Look for what a rule would never count, and so would pass every bound.

    Args:
        labels: Detector's name → the classes that it knows.
        labelled: all cases of the protocol.

    Raises:
        UsageError: a class or a prompt's label that the detector doesn't know, or more best labels than it names.
    """
    for rule in rules:
        if isinstance(rule, AnyRule):
            continue
        name = rule.detector or detectors[0].name
        known = labels[name]
        if isinstance(rule, BoxRule):
            _counting(rule).check(known)
            continue
        if rule.top > min(TOP, len(known)):
            raise UsageError(
                f"rule {rule.name} asks for the {rule.top} best labels, and {name} names {min(TOP, len(known))}"
            )
        wanted = rule.classes if isinstance(rule, ClassRule) else [case.label for case in labelled if case.label]
        try:
            check_labels(wanted, known)
        except UsageError as error:
            raise UsageError(f"rule {rule.name}: {error}") from error


def outcomes(
    rules: Sequence[AnyKindOfRule],
    detectors: Sequence[Detector],
    observed: Observations,
    cases: Sequence[Case],
    labelled: Sequence[Case],
) -> list[Outcome]:
    """Every rule's figures, in the protocol's order.

    Args:
        observed: of the images of ``cases``, row i of case i.
        labelled: all cases of the protocol, also in a run with fewer: they say which labels were erased.
    """
    found: list[Outcome] = []
    by_rule: dict[str, Outcome] = {}
    # Counts are of what was erased; a protocol without such prompts counts in all of its images.
    group = ERASED if any(case.group == ERASED for case in labelled) else None
    erased = tuple({case.label for case in labelled if case.group == ERASED and case.label})
    for rule in rules:
        if isinstance(rule, AnyRule):
            parts_of = [by_rule[name] for name in rule.any_of]
            counts = np.any([one.counts > 0 for one in parts_of], axis=0).astype(np.int64)
            flags = any(one.flags for one in parts_of)
            made = [Outcome(rule.measures()[0], group, counts, True, {}, flags=flags)]
        else:
            looked = observed[rule.detector or detectors[0].name]
            if isinstance(rule, BoxRule):
                made = [_of_boxes(rule, looked, group)]
            elif isinstance(rule, ClassRule):
                counts = _seen(looked, rule.classes, rule.top)
                made = [Outcome(rule.measures()[0], group, counts, True, {})]
            else:
                made = _of_labels(rule, looked, cases, erased)
        found += made
        by_rule[rule.name] = made[0]
    return found


def _counting(rule: BoxRule) -> CountingRule:
    return CountingRule(rule.name, rule.classes, rule.threshold, once_per_class=rule.count != "every_box")


def _of_boxes(rule: BoxRule, looked: Sequence[Mapping[str, Any]], group: str | None) -> Outcome:
    rows = [parts(boxes_of(one), _counting(rule)) for one in looked]
    per_class = {name: np.array([row[name] for row in rows], np.int64) for name in rule.classes}
    counts = np.sum(list(per_class.values()), axis=0).astype(np.int64)
    if rule.count == "image":
        return Outcome(rule.measures()[0], group, (counts > 0).astype(np.int64), True, {})
    return Outcome(rule.measures()[0], group, counts, False, per_class)


def _of_labels(
    rule: LabelRule, looked: Sequence[Mapping[str, Any]], cases: Sequence[Case], erased: Sequence[str]
) -> list[Outcome]:
    detected, recognised = rule.measures()
    own = hits(looked, [case.label or "" for case in cases], rule.top).astype(np.int64)
    return [
        Outcome(detected, ERASED, _seen(looked, erased, rule.top), True, {}, flags=False),
        Outcome(recognised, KEPT, own, True, {}, better="higher", flags=False),
    ]


def _seen(looked: Sequence[Mapping[str, Any]], labels: Sequence[str], top: int) -> Counts:
    return np.array([seen(one, labels, top) for one in looked], np.int64)


def in_words(observed: Observations, index: int, *, best: int = 3) -> tuple[str, ...]:
    """What the detectors saw in one image, for people, such as ``BELLY_EXPOSED 0.71``."""
    words: list[str] = []
    for looked in observed.values():
        one = looked[index]
        if "boxes" in one:
            words += [f"{box.name} {box.score:.2f}" for box in boxes_of(one)[:best]]
        else:
            words.append(f"{one['labels'][0]} {one['probabilities'][0]:.2f}")
    return tuple(words)
