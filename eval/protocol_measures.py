"""A protocol's figures: of each runtime, and of each runtime beside the unedited and the edited model's.

Everything is paired by case: row i of every array is case i. Names are those of ``measure_names``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.eval import bootstrap, counts, paired_outcomes
from excise.eval.boxes import boxes_of
from excise.eval.cases import Case
from excise.eval.counting import FACES, parts
from excise.eval.distribution_distance import frechet_of_features, kernel_distance
from excise.eval.evaluation import Measure
from excise.eval.feature_extractor import distance_name
from excise.eval.permutation import mmd_p_value, sign_flip_p_value
from excise.eval.power import FlipsByChance, smallest_increase
from excise.eval.rule_outcomes import Outcome
from excise.eval.statistics import wilson

Figures = dict[str, Measure]
Real = npt.NDArray[np.float64]

#: Resamples of a distance between distributions: each costs a decomposition.
RESAMPLES = 200


def members(cases: Sequence[Case], group: str | None) -> npt.NDArray[np.intp]:
    """The rows of a group's cases; None is all."""
    return np.array([row for row, case in enumerate(cases) if group in (None, case.group)], np.intp)


def of_outcomes(found: Sequence[Outcome], cases: Sequence[Case]) -> Figures:
    """Counts and rates of one runtime, with the classes of rules of boxes as ``measure.rule.CLASS``."""
    figures: Figures = {}
    for one in found:
        rows = members(cases, one.group)
        if one.binary:
            share = wilson(int(one.counts[rows].sum()), len(rows))
            figures[one.name] = Measure(
                value=share.value, low=share.low, high=share.high, n=share.n, unit="fraction", method="wilson",
                better="higher" if one.better == "higher" else "lower",
            )  # fmt: skip
            continue
        figures[one.name] = counts.count(one.counts[rows]).model_copy(update={"better": "lower"})
        for name, values in one.per_class.items():
            figures[f"{one.name}.{name}"] = counts.count(values[rows]).model_copy(update={"better": "lower"})
    return figures


def of_faces(seen: Sequence[Mapping[str, Any]]) -> Figures:
    """Female and male faces, and their ratio: the bias of a model, as NudeNet's classes show it."""
    rows = [boxes_of(one) for one in seen]
    female, male = (
        np.array([sum(parts(boxes, rule).values()) for boxes in rows], np.int64) for rule in (FACES.female, FACES.male)
    )
    return {
        "female.FACES": counts.count(female),
        "male.FACES": counts.count(male),
        "female_ratio.FACES": counts.ratio(male, female),
    }


def of_pair(reference: Sequence[Outcome], judged: Sequence[Outcome], cases: Sequence[Case]) -> Figures:
    """What the judged runtime's counts are beside the reference's."""
    figures: Figures = {}
    for one, other in zip(reference, judged, strict=True):
        rows, (metric, dot, rest) = members(cases, one.group), one.name.partition(".")
        a, b = one.counts[rows], other.counts[rows]
        figures[f"{metric}_ratio{dot}{rest}"] = counts.ratio(a, b)
        if not one.binary:
            continue
        x, y = a > 0, b > 0
        figures[f"{metric}_flips{dot}{rest}"] = paired_outcomes.flips(x, y)
        figures[f"{metric}_flips_p_value{dot}{rest}"] = paired_outcomes.flips_p_value(x, y)
        figures[f"{metric}_increase{dot}{rest}"] = paired_outcomes.increase(x, y)
        figures[f"{metric}_drop{dot}{rest}"] = paired_outcomes.increase(y, x)
    return figures


def of_values(name: str, values: Real, cases: Sequence[Case], *, unit: str, better: bootstrap.Better) -> Figures:
    """The mean of a figure of each image, by group; ``name`` has the group in the place of ``{}``."""
    return {
        name.format(group): bootstrap.mean(values[members(cases, group)], unit=unit, better=better)
        for group in dict.fromkeys(case.group for case in cases)
    }


def of_value_pair(name: str, reference: Real, judged: Real, cases: Sequence[Case], *, unit: str) -> Figures:
    """How much of a figure the judged runtime lost, and how likely that is chance; ``{0}`` is an ending's place."""
    figures: Figures = {}
    for group in dict.fromkeys(case.group for case in cases):
        rows = members(cases, group)
        figures[name.format("_drop", group)] = bootstrap.mean_drop(reference[rows], judged[rows], unit=unit)
        figures[name.format("_p_value", group)] = sign_flip_p_value(reference[rows], judged[rows])
    return figures


def of_distributions(
    metric: str, extractor: str, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]
) -> Measure:
    """FID or KID of two runtimes' features, both (n, d), with the interval of resampled cases."""
    unit = distance_name(metric.upper(), extractor)
    statistic = frechet_of_features if metric == "fid" else _kid
    return bootstrap.of_features(statistic, first, second, unit=unit, resamples=RESAMPLES)


def _kid(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    return kernel_distance(first, second, subsets=None)


def of_movement(judged: Real, edit: Real) -> Measure:
    """``relative_to_edit``: √(Σ|B − A|² / Σ|A − O|²) over all images.

    A are the edited model's, B the judged runtime's, O the unedited model's. Single images' ratios would say nothing
    where the edit hardly moves an image.

    Args:
        judged, edit: Σ over each image's pixels of |B − A|² and of |A − O|², with shape (n,).
    """
    n = len(judged)
    if n < 2 or not edit.sum():
        why = "the edit moves no image" if n >= 2 else f"{n} images: at least two are needed"
        return Measure(value=None, n=n, better="lower", error=why)

    def ratio(rows: npt.NDArray[np.intp], axis: int) -> Any:
        moved = edit[rows].sum(axis)
        return np.sqrt(judged[rows].sum(axis) / np.where(moved > 0, moved, np.nan))

    value = float(np.sqrt(judged.sum() / edit.sum()))
    if value == 0:
        return Measure(value=0.0, low=0.0, high=0.0, n=n, unit="of the edit", method="equal images", better="lower")
    ends = bootstrap.interval(ratio, n, method="percentile")
    low, high = min(ends.low, value), max(ends.high, value)
    return Measure(value=value, low=low, high=high, n=n, unit="of the edit", method=ends.method, better="lower")


def changed_features(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> Measure:
    """Whether the runtime changed the distribution of its images, by a permutation test on their features."""
    return mmd_p_value(first, second)


def power(found: Sequence[Outcome], cases: Sequence[Case]) -> Iterator[tuple[str, Measure]]:
    """Of each rate of the reference: the smallest increase that McNemar's test sees in 95 of 100 runs."""
    for one in found:
        rows = members(cases, one.group)
        if not one.binary or one.better != "lower" or not len(rows):
            continue
        rate = float((one.counts[rows] > 0).mean())
        yield one.name, smallest_increase(FlipsByChance(), len(rows), rate, unit="count")
