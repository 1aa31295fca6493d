"""A protocol's figures: of each runtime, and of each runtime beside the unedited and the edited model's.

Everything is paired by case: row i of every array is case i. Names are those of ``measure_names``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval import bootstrap, counts, paired_outcomes
from excise.eval.boxes import boxes_of
from excise.eval.cases import Case
from excise.eval.counting import FACES, PARTS, parts
from excise.eval.evaluation import Measure
from excise.eval.permutation import sign_flip_p_value
from excise.eval.power import FlipsByChance, smallest_increase
from excise.eval.protocol_schema import Metric
from excise.eval.rule_outcomes import Outcome
from excise.eval.statistics import wilson

Figures = dict[str, Measure]
Real = npt.NDArray[np.float64]


def members(cases: Sequence[Case], group: str | None) -> npt.NDArray[np.intp]:
    """The rows of a group's cases; None is all."""
    return np.array([row for row, case in enumerate(cases) if group in (None, case.group)], np.intp)


def groups_of(metric: Metric) -> tuple[str | None, ...]:
    """The groups that a metric is wanted of; None is all images together."""
    return metric.groups or (None,)


def named(metric: str, group: str | None, variant: str | None = None) -> str:
    """A figure's name, as ``Metric.measures`` has it: ``lpips.erased.64``."""
    return ".".join(part for part in (metric, group, variant) if part)


def of_outcomes(found: Sequence[Outcome], cases: Sequence[Case]) -> Figures:
    """Counts and rates of one runtime, with the classes of rules of boxes as ``measure.rule.CLASS``."""
    figures: Figures = {}
    for one in found:
        rows = members(cases, one.group)
        if not len(rows):
            unit, why = "fraction" if one.binary else "count", f"no {one.group} prompts were run"
            figures[one.name] = Measure(value=None, n=0, unit=unit, better=one.better, error=why)
        elif one.binary:
            figures[one.name] = wilson(int(one.counts[rows].sum()), len(rows)).measure(one.better)
        else:
            figures[one.name] = counts.count(one.counts[rows])
            figures |= {f"{one.name}.{name}": counts.count(values[rows]) for name, values in one.per_class.items()}
    return figures


def of_genders(seen: Sequence[Mapping[str, Any]]) -> Figures:
    """Female and male counts, and female by male: the bias of a model, by both rules of ``counting``."""
    boxes, figures = [boxes_of(one) for one in seen], Figures()
    for rule in (FACES, PARTS):
        female, male = (
            np.array([sum(parts(one, side).values()) for one in boxes], np.int64) for side in (rule.female, rule.male)
        )
        found = {"female": counts.count(female), "male": counts.count(male), "female_ratio": counts.ratio(male, female)}
        if found["female_ratio"].value is None:
            none = {"error": "no male one was found, so there is no ratio"}
            found["female_ratio"] = found["female_ratio"].model_copy(update=none)
        for name, one in found.items():
            unit = "female per male" if name == "female_ratio" else one.unit
            figures[f"{name}.{rule.name}"] = one.model_copy(update={"better": "neither", "unit": unit})
    return figures


def of_pair(reference: Sequence[Outcome], judged: Sequence[Outcome], cases: Sequence[Case]) -> Figures:
    """What the judged runtime's counts are beside the reference's."""
    figures: Figures = {}
    for one, other in zip(reference, judged, strict=True):
        rows, (metric, dot, rest) = members(cases, one.group), one.name.partition(".")
        a, b = one.counts[rows], other.counts[rows]
        figures[f"{metric}_ratio{dot}{rest}"] = counts.ratio(a, b).model_copy(update={"better": one.better})
        if not one.binary:
            continue
        x, y = a > 0, b > 0
        more, less = paired_outcomes.increase(x, y), paired_outcomes.increase(y, x)
        if one.better == "higher":
            more = more.model_copy(update={"better": "higher"})
        else:
            less = less.model_copy(update={"better": "higher"})
        figures[f"{metric}_flips{dot}{rest}"] = paired_outcomes.flips(x, y)
        figures[f"{metric}_flips_p_value{dot}{rest}"] = paired_outcomes.flips_p_value(x, y)
        figures[f"{metric}_increase{dot}{rest}"] = more
        figures[f"{metric}_drop{dot}{rest}"] = less
    return figures


def of_values(metric: Metric, values: Real, cases: Sequence[Case], *, unit: str, better: bootstrap.Better) -> Figures:
    """The mean of a figure of each image, by the metric's groups."""
    return {
        named(metric.name, group): bootstrap.mean(values[members(cases, group)], unit=unit, better=better)
        for group in groups_of(metric)
    }


def of_value_pair(metric: Metric, reference: Real, judged: Real, cases: Sequence[Case], *, unit: str) -> Figures:
    """How much of a figure the judged runtime lost, by the metric's groups, and how likely that is chance."""
    figures: Figures = {}
    for group in groups_of(metric):
        rows = members(cases, group)
        figures[named(f"{metric.name}_drop", group)] = bootstrap.mean_drop(reference[rows], judged[rows], unit=unit)
        figures[named(f"{metric.name}_p_value", group)] = sign_flip_p_value(reference[rows], judged[rows])
    return figures


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
        return Measure(value=None, n=n, unit="of the edit", better="lower", error=why)

    def ratio(rows: npt.NDArray[np.intp], axis: int) -> Any:
        moved = edit[rows].sum(axis)
        return np.sqrt(judged[rows].sum(axis) / np.where(moved > 0, moved, np.nan))

    value = float(np.sqrt(judged.sum() / edit.sum()))
    if value == 0:
        return Measure(value=0.0, low=0.0, high=0.0, n=n, unit="of the edit", method="equal images", better="lower")
    try:
        ends = bootstrap.interval(ratio, n, method="percentile")
    except UsageError:
        # So few images does the edit move that some resamples have none of them.
        method = "no interval: the edit moves too few images for a bootstrap"
        return Measure(value=value, n=n, unit="of the edit", method=method, better="lower")
    low, high = min(ends.low, value), max(ends.high, value)
    return Measure(value=value, low=low, high=high, n=n, unit="of the edit", method=ends.method, better="lower")


def power(found: Sequence[Outcome], cases: Sequence[Case]) -> Iterator[tuple[str, Measure]]:
    """Of each rate of the reference: the smallest increase that McNemar's test sees in 95 of 100 runs."""
    for one in found:
        rows = members(cases, one.group)
        if not one.binary or one.better != "lower" or not len(rows):
            continue
        rate = float((one.counts[rows] > 0).mean())
        if rate == 1:
            why = "every image counts already: there is no increase to see"
            yield one.name, Measure(value=None, n=len(rows), unit="count", better="lower", error=why)
        else:
            yield one.name, smallest_increase(FlipsByChance(), len(rows), rate, unit="count")
