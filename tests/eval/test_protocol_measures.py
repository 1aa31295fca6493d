"""Figures made of hand-made counts and arrays, against direct computation."""

from __future__ import annotations

import numpy as np
import pytest

from excise.eval import bootstrap, counts, paired_outcomes
from excise.eval.boxes import Box, observation
from excise.eval.cases import Case
from excise.eval.measure_names import unknown_metric
from excise.eval.permutation import sign_flip_p_value
from excise.eval.power import FlipsByChance, smallest_increase
from excise.eval.protocol_measures import (
    members,
    named,
    of_genders,
    of_movement,
    of_outcomes,
    of_pair,
    of_value_pair,
    of_values,
    power,
)
from excise.eval.protocol_schema import Metric
from excise.eval.rule_outcomes import Outcome
from excise.eval.statistics import wilson

ERASED, KEPT = 12, 8
CASES = [Case(str(row), "a cat", row, 5.0, "erased" if row < ERASED else "kept", "cat") for row in range(ERASED + KEPT)]
RNG = np.random.default_rng(0)
SCORE = Metric(name="clip_score", model="demo:clip", groups=("kept", "erased"))


def outcome(
    shown: list[int], *, name: str = "nude_images.r", group: str | None = "erased", **fields: object
) -> Outcome:
    row = np.zeros(len(CASES), np.int64)
    row[shown] = 1
    return Outcome(name, group, row, **{"binary": True, "per_class": {}, **fields})  # type: ignore[arg-type]


def test_rates_are_of_the_group_alone() -> None:
    figures = of_outcomes(
        [outcome([0, 1, 13]), outcome([13, 14], name="recognised.r", group="kept", better="higher")], CASES
    )
    assert figures["nude_images.r"] == wilson(2, ERASED).measure("lower")
    assert figures["recognised.r"] == wilson(2, KEPT).measure("higher")
    everything = of_outcomes([outcome([0, 1, 13], group=None)], CASES)
    assert everything["nude_images.r"] == wilson(3, ERASED + KEPT).measure("lower")


def test_counts_of_parts_come_with_their_classes() -> None:
    feet, belly = np.zeros(20, np.int64), np.zeros(20, np.int64)
    feet[[0, 1, 15]], belly[0] = (3, 1, 7), 1
    found = outcome([], name="nude_parts.r").__class__(
        "nude_parts.r", "erased", feet + belly, False, {"FEET": feet, "BELLY": belly}
    )
    figures = of_outcomes([found], CASES)
    assert list(figures) == ["nude_parts.r", "nude_parts.r.FEET", "nude_parts.r.BELLY"]
    assert figures["nude_parts.r"] == counts.count((feet + belly)[:ERASED])
    assert [one.value for one in figures.values()] == [5, 4, 1]
    pair = of_pair([found], [found], CASES)
    assert list(pair) == ["nude_parts_ratio.r"]
    assert pair["nude_parts_ratio.r"].value == 1


def test_a_group_without_images_says_so() -> None:
    kept = [case for case in CASES if case.group == "kept"]
    one = Outcome("detected.r", "erased", np.ones(KEPT, np.int64), True, {})
    (found,) = of_outcomes([one], kept).values()
    assert (found.value, found.n, found.error) == (None, 0, "no erased prompts were run")
    for figure in of_pair([one], [one], kept).values():
        assert figure.value is None
        assert figure.error
    assert dict(power([one], kept)) == {}
    assert of_values(SCORE, np.ones(KEPT), kept, unit="", better="higher")["clip_score.erased"].error == "no images"


def test_pairs_are_judged_case_by_case() -> None:
    reference, judged = outcome([0, 1, 2, 15]), outcome([2, 3, 4, 5, 6, 16])
    figures = of_pair([reference], [judged], CASES)
    a, b = reference.counts[:ERASED] > 0, judged.counts[:ERASED] > 0
    assert list(figures) == [f"nude_images_{one}.r" for one in ("ratio", "flips", "flips_p_value", "increase", "drop")]
    assert figures["nude_images_ratio.r"].value == 5 / 3
    assert figures["nude_images_flips.r"] == paired_outcomes.flips(a, b)
    assert figures["nude_images_flips.r"].value == 6
    assert figures["nude_images_flips_p_value.r"] == paired_outcomes.flips_p_value(a, b)
    assert figures["nude_images_increase.r"] == paired_outcomes.increase(a, b)
    assert figures["nude_images_increase.r"].value == 2 / ERASED
    drop = figures["nude_images_drop.r"]
    assert drop.value == -2 / ERASED
    # What of an erased concept is lost is good, and of a kept one it isn't.
    assert (figures["nude_images_increase.r"].better, drop.better) == ("lower", "higher")
    kept = of_pair([outcome([], better="higher")], [outcome([], better="higher")], CASES)
    assert (kept["nude_images_increase.r"].better, kept["nude_images_drop.r"].better) == ("higher", "lower")
    assert not [name for name in figures if unknown_metric(name)]


def test_means_are_of_the_groups_that_were_asked_for() -> None:
    a, b = RNG.normal(30, 2, 20), RNG.normal(29, 2, 20)
    figures = of_values(SCORE, a, CASES, unit="u", better="higher")
    assert list(figures) == ["clip_score.kept", "clip_score.erased"]
    assert figures["clip_score.kept"] == bootstrap.mean(a[ERASED:], unit="u", better="higher")
    pair = of_value_pair(SCORE, a, b, CASES, unit="u")
    assert pair["clip_score_drop.erased"] == bootstrap.mean_drop(a[:ERASED], b[:ERASED], unit="u")
    assert pair["clip_score_p_value.erased"] == sign_flip_p_value(a[:ERASED], b[:ERASED])
    plain = Metric(name="clip_score", model="demo:clip")
    assert of_values(plain, a, CASES, unit="", better="higher")["clip_score"].value == pytest.approx(
        a.mean(), rel=1e-15
    )
    assert list(of_value_pair(plain, a, b, CASES, unit="")) == ["clip_score_drop", "clip_score_p_value"]
    assert list(plain.measures()) == [named("clip_score", None)]
    assert members(CASES, None).tolist() == list(range(20))


def test_the_balance_of_what_nudenet_takes_for_women_and_men() -> None:
    boxes = [["FACE_FEMALE", "FACE_FEMALE", "FACE_MALE"], ["FACE_FEMALE", "MALE_BREAST_EXPOSED"], []]
    figures = of_genders([observation(Box(name, 0.7, (0, 0, 1, 1)) for name in one) for one in boxes])
    assert {name: one.value for name, one in figures.items()} == {
        "female.FACES": 3, "male.FACES": 1, "female_ratio.FACES": 3,
        "female.PARTS": 0, "male.PARTS": 1, "female_ratio.PARTS": 0,
    }  # fmt: skip
    assert {one.better for one in figures.values()} == {"neither"}
    assert figures["female_ratio.FACES"].unit == "female per male"
    none = of_genders([{"boxes": []}])["female_ratio.FACES"]
    assert (none.value, none.error) == (None, "no male one was found, so there is no ratio")


def test_movement_relative_to_the_edits() -> None:
    edit = RNG.uniform(50, 100, 30)
    found = of_movement(edit * 0.04, edit)
    # √0.04 of every image, and so of every resample.
    assert found.value == pytest.approx(0.2, rel=1e-12)
    assert found.low == pytest.approx(0.2, rel=1e-12)
    assert found.high == pytest.approx(0.2, rel=1e-12)
    judged = RNG.uniform(0, 10, 30)
    mixed = of_movement(judged, edit)
    assert mixed.value == np.sqrt(judged.sum() / edit.sum())
    assert mixed.low is not None
    assert mixed.high is not None
    assert mixed.value is not None
    assert mixed.low < mixed.value < mixed.high
    # An export that lost the edit is as far from the edited model as the unedited one is.
    assert of_movement(edit, edit).value == 1
    zero = of_movement(np.zeros(30), edit)
    assert (zero.value, zero.low, zero.high, zero.method) == (0, 0, 0, "equal images")


def test_movement_where_the_edit_hardly_moves_an_image() -> None:
    nothing = of_movement(np.ones(5), np.zeros(5))
    assert (nothing.value, nothing.error) == (None, "the edit moves no image")
    assert of_movement(np.ones(1), np.ones(1)).error == "1 images: at least two are needed"
    # One image of five is moved: a third of the resamples have none, and a run must not end for that.
    edit = np.array([4.0, 0, 0, 0, 0])
    one = of_movement(np.ones(5), edit)
    assert (one.value, one.low, one.high) == (np.sqrt(5 / 4), None, None)
    assert one.method.startswith("no interval: the edit moves too few images")


def test_the_power_of_the_references_rates() -> None:
    rates = [outcome([0, 1]), outcome([13], name="recognised.r", group="kept", better="higher")]
    parts = Outcome("nude_parts.r", "erased", np.ones(20, np.int64), False, {})
    found = dict(power([*rates, parts], CASES))
    assert found == {"nude_images.r": smallest_increase(FlipsByChance(), ERASED, 2 / ERASED, unit="count")}
    every = outcome(list(range(ERASED)))
    full = dict(power([every], CASES))["nude_images.r"]
    assert (full.value, full.error) == (None, "every image counts already: there is no increase to see")
