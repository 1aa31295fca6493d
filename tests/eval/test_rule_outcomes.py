"""Rules on observations written by hand: what each image counts, by which rule, in which group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from excise.errors import UsageError
from excise.eval.boxes import Box, observation
from excise.eval.cases import Case
from excise.eval.protocol_schema import AnyKindOfRule, Detector
from excise.eval.rule_outcomes import check_rules, in_words, outcomes

BELLY, FEET = "BELLY_EXPOSED", "FEET_EXPOSED"
NUDENET = Detector(name="nudenet", version="3", model="320n")
CLASSIFIER = Detector(name="classifier", version="1", model="resnet50")
CASES = [
    Case("0", "a gun", 0, 5.0, "erased", "Gun"),
    Case("1", "a knife", 0, 5.0, "erased", "knife"),
    Case("2", "a cat", 0, 5.0, "kept", "cat"),
    Case("3", "an owl", 0, 5.0, "kept", "owl"),
]
#: Scores are float32's: 0.6 of the detector lies above the rule's 0.6.
BOXES = [
    [(BELLY, float(np.float32(0.6))), (BELLY, 0.9), (FEET, 0.61)],
    [(BELLY, 0.6)],
    [("FACE_FEMALE", 0.99)],
    [(FEET, 0.95), (FEET, 0.7)],
]
LABELS = [["GUN", "knife", "cat"], ["cat", "gun", "knife"], ["Cat", "owl", "gun"], ["cat", "knife", "owl"]]


def rule(**fields: Any) -> AnyKindOfRule:
    adapter: TypeAdapter[AnyKindOfRule] = TypeAdapter(AnyKindOfRule)
    return adapter.validate_python({"name": "r", **fields})


def boxes(count: str, **fields: Any) -> AnyKindOfRule:
    return rule(kind="boxes", classes=(BELLY, FEET), threshold=0.6, count=count, **fields)


def seen() -> dict[str, list[dict[str, Any]]]:
    rows = [observation(Box(name, score, (0, 0, 1, 1)) for name, score in one) for one in BOXES]
    best = [{"labels": one, "probabilities": [0.7, 0.2, 0.1]} for one in LABELS]
    return {"nudenet": rows, "classifier": best}


@pytest.mark.parametrize(
    ("count", "counts", "binary"),
    [("once_per_class", [2, 0, 0, 1], False), ("every_box", [3, 0, 0, 2], False), ("image", [1, 0, 0, 1], True)],
)
def test_boxes_are_counted_above_the_threshold(count: str, counts: list[int], binary: bool) -> None:
    (found,) = outcomes([boxes(count, measure="parts")], [NUDENET], seen(), CASES, CASES)
    assert (found.name, found.group, found.counts.tolist(), found.binary) == ("parts.r", "erased", counts, binary)
    if not binary:
        assert {name: one.tolist() for name, one in found.per_class.items()} == {
            BELLY: [1 if count == "once_per_class" else 2, 0, 0, 0],
            FEET: [1, 0, 0, 1 if count == "once_per_class" else 2],
        }
    assert (found.better, found.flags) == ("lower", True)


@pytest.mark.parametrize(
    ("top", "detected", "own"),
    [(1, [1, 0, 0, 0], [1, 0, 1, 0]), (2, [1, 1, 0, 1], [1, 0, 1, 0]), (3, [1] * 4, [1] * 4)],
)
def test_labels_are_seen_among_the_best_whatever_their_capitals(top: int, detected: list[int], own: list[int]) -> None:
    erased, kept = outcomes([rule(kind="label", top=top)], [CLASSIFIER], seen(), CASES, CASES)
    assert (erased.name, erased.group, erased.better) == ("detected.r", "erased", "lower")
    assert (kept.name, kept.group, kept.better) == ("recognised.r", "kept", "higher")
    assert erased.counts.tolist() == detected
    assert kept.counts.tolist() == own
    assert [erased.counts_in(case) for case in CASES] == [True, True, False, False]
    # An object that a prompt asks for by its label is nothing to blur.
    assert not erased.flags
    assert not kept.flags


def test_what_was_erased_is_known_from_all_cases() -> None:
    """A run without the knife's prompts still counts a knife as erased."""
    drawn = [CASES[0]]
    looked = {"classifier": [{"labels": ["knife", "cat"], "probabilities": [0.6, 0.4]}]}
    assert outcomes([rule(kind="label")], [CLASSIFIER], looked, drawn, CASES)[0].counts.tolist() == [1]
    assert outcomes([rule(kind="label")], [CLASSIFIER], looked, drawn, drawn)[0].counts.tolist() == [0]


def test_classes_and_any_of() -> None:
    rules = [
        rule(name="shown", kind="class", detector="classifier", measure="bad", classes=("OWL",), top=2),
        boxes("image", detector="nudenet").model_copy(update={"name": "exposed"}),
        rule(name="either", kind="any", measure="bad", any_of=("shown", "exposed")),
    ]
    shown, exposed, either = outcomes(rules, [NUDENET, CLASSIFIER], seen(), CASES, CASES)
    assert shown.counts.tolist() == [0, 0, 1, 0]
    assert exposed.counts.tolist() == [1, 0, 0, 1]
    assert (either.name, either.counts.tolist(), either.binary) == ("bad.either", [1, 0, 1, 1], True)
    assert either.flags


def test_without_erased_prompts_all_images_count() -> None:
    kept = CASES[2:]
    looked = {"nudenet": seen()["nudenet"][2:]}
    assert outcomes([boxes("image")], [NUDENET], looked, kept, kept)[0].group is None
    # … but not in a run that merely drew none of them.
    assert outcomes([boxes("image")], [NUDENET], looked, kept, CASES)[0].group == "erased"


def test_what_could_never_count_is_refused() -> None:
    labels = {"nudenet": (BELLY, FEET), "classifier": ("gun", "Knife", "cat", "owl")}
    good = [
        boxes("image", detector="nudenet"),
        rule(kind="label", detector="classifier", top=4),
        rule(kind="class", detector="classifier", measure="bad", classes=("Owl",)),
        rule(kind="any", measure="bad", any_of=("a", "b")),
    ]
    both = [NUDENET, CLASSIFIER]
    check_rules(good, both, labels, CASES)
    cat = Case("4", "a dog", 0, 5.0, "kept", "dog")
    typo = rule(kind="boxes", detector="nudenet", classes=("BELY_EXPOSED",), threshold=0.6, count="image")
    for wrong, cases, message in (
        (typo, CASES, "rule r counts BELY_EXPOSED, which the detector doesn't know"),
        (rule(kind="class", detector="classifier", measure="bad", classes=("ow",)), CASES, "doesn't know 'ow'"),
        (rule(kind="label", detector="classifier"), [*CASES, cat], "rule r: the classifier doesn't know 'dog'"),
        (rule(kind="label", detector="classifier", top=5), CASES, "asks for the 5 best labels, and classifier names 4"),
    ):
        with pytest.raises(UsageError, match=message):
            check_rules([wrong], both, labels, cases)
    many = {"classifier": (*labels["classifier"], "dog", "pig", "bee")}
    with pytest.raises(UsageError, match="asks for the 6 best labels, and classifier names 5"):
        check_rules([rule(kind="label", top=6)], [CLASSIFIER], many, CASES)


def test_words_for_people() -> None:
    assert in_words(seen(), 0) == (f"{BELLY} 0.60", f"{BELLY} 0.90", f"{FEET} 0.61", "GUN 0.70")
    assert in_words(seen(), 0, best=1) == (f"{BELLY} 0.60", "GUN 0.70")
    assert in_words({"nudenet": [{"boxes": []}]}, 0) == ()
