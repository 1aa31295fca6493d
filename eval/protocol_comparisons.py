"""What a runtime's figures are beside the unedited and the edited model's, case by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from excise.errors import UsageError
from excise.eval import bootstrap
from excise.eval.cases import Case
from excise.eval.evaluation import Comparison, Measure
from excise.eval.floor import floor, run_differences
from excise.eval.pixel_movement import Movements, psnr_of
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_measures import (
    Figures,
    changed_features,
    members,
    of_distributions,
    of_movement,
    of_pair,
    of_value_pair,
)
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_schema import Metric
from excise.eval.run_images import Looked, RunImages

Real = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Roles:
    """Which runtime stands for what.

    Attributes:
        base: The unedited model.
        reference: The edited model, by which the others are judged.
        floor: Runs of the reference's model in another way, such as another batch size: how far they are from it is
            what rounding alone does.
    """

    base: str | None = None
    reference: str | None = None
    floor: tuple[str, ...] = ()

    def check(self, names: Sequence[str]) -> None:
        """Raise ``UsageError`` for a role that none of ``names`` can have."""
        for role, name in (("base", self.base), ("reference", self.reference), *(("floor", one) for one in self.floor)):
            if name is not None and name not in names:
                raise UsageError(f"--{role} {name}: the runtimes are {', '.join(names)}")
        if self.base is not None and self.base in (self.reference, *self.floor):
            raise UsageError(f"--base {self.base}: the unedited model can't be the edited one as well")
        if self.floor and self.reference is None:
            raise UsageError("--floor needs --reference, whose model it runs in another way")


@dataclass
class Measured:
    """What is known of one runtime."""

    images: RunImages
    looked: Looked
    values: dict[str, Real] = field(default_factory=dict)  #: figures of each image, by the metric's name
    figures: Figures = field(default_factory=dict)


def distances(
    metric: Metric, runs: Mapping[str, Measured], first: str | None, second: str, models: ProtocolModels, role: str
) -> Figures:
    figures: Figures = {}
    for group in metric.groups or (None,):
        name = metric.name if group is None else f"{metric.name}.{group}"
        if first is None or first == second:
            why = f"no runtime is the {role}" if first is None else f"this is the {role} itself"
            figures[name] = Measure(value=None, n=0, better="lower", error=why)
            continue
        extractor = models.extractor(metric)
        rows = members(runs[first].images.cases, group)
        a, b = (runs[name].images.features(extractor)[rows] for name in (first, second))
        if len(rows) < 2:
            figures[name] = Measure(value=None, n=len(rows), better="lower", error="needs two images")
        else:
            figures[name] = of_distributions(metric.name, extractor.name, a, b)
    return figures


def moved_pairs(names: Sequence[str], roles: Roles) -> list[tuple[str, str]]:
    """Whose pixels are compared: the edit's movement, and every other runtime with the edited model's."""
    own = [(roles.base, roles.reference)] if roles.base and roles.reference else []
    return own + _beside_reference(names, roles)


def compared_pairs(names: Sequence[str], roles: Roles) -> list[tuple[str, str]]:
    """Whose figures are compared: all with the unedited model's, and all but that with the edited model's."""
    moved = [(roles.base, name) for name in names if name != roles.base] if roles.base else []
    return moved + _beside_reference(names, roles)


def _beside_reference(names: Sequence[str], roles: Roles) -> list[tuple[str, str]]:
    if roles.reference is None:
        return []
    return [(roles.reference, name) for name in names if name not in (roles.base, roles.reference)]


def compared(
    pair: tuple[str, str],
    protocol: ProtocolFile,
    runs: Mapping[str, Measured],
    roles: Roles,
    models: ProtocolModels,
    squared: Movements,
    size: int,
) -> Comparison:
    """``pair[1]`` beside ``pair[0]``.

    Args:
        squared: squared distances of ``moved_pairs``' images, each of ``size`` values.
    """
    first, second = (runs[name] for name in pair)
    cases = first.images.cases
    figures = of_pair(first.looked.outcomes, second.looked.outcomes, cases)
    if "clip_score" in first.values:
        a, b = (run.values["clip_score"] for run in (first, second))
        figures |= of_value_pair("clip_score{0}.{1}", a, b, cases, unit="")
    if pair[0] != roles.reference:
        return Comparison(first=pair[0], second=pair[1], measures=figures)
    edit = squared.get((roles.base or "", roles.reference or ""))
    if edit is None:
        figures["relative_to_edit"] = Measure(value=None, n=len(cases), error="no runtime is the base")
    else:
        figures["relative_to_edit"] = of_movement(squared[pair], edit)
        if floors := [squared[roles.reference, name] for name in roles.floor if name != pair[1]]:
            figures["relative_to_edit_floor"] = of_movement(np.max(floors, axis=0), edit)
    for metric in protocol.metrics:
        if metric.name == "psnr" and "reference" in metric.against:
            figures |= _psnr(metric, psnr_of(squared[pair], size), cases)
        elif metric.name in ("fid", "kid") and "reference" in metric.against:
            figures |= distances(metric, runs, *pair, models, "reference")
            extractor = models.extractor(metric)
            features = [run.images.features(extractor) for run in (first, second)]
            if len(cases) >= 2:
                figures["features_p_value"] = changed_features(*features)
    figures |= _floors(runs, roles)
    return Comparison(first=pair[0], second=pair[1], measures=figures)


def _psnr(metric: Metric, values: Real, cases: Sequence[Case]) -> Figures:
    figures: Figures = {}
    for group in metric.groups or (None,):
        chosen = values[members(cases, group)]
        finite = chosen[np.isfinite(chosen)]
        name = "psnr" if group is None else f"psnr.{group}"
        unit = f"dB, {len(chosen) - len(finite)} of {len(chosen)} pairs equal"
        if len(finite) < 2:
            why = f"{len(chosen) - len(finite)} of {len(chosen)} pairs are equal: too few differ for a mean"
            figures[name] = Measure(value=None, n=len(chosen), unit="dB", better="higher", error=why)
        else:
            figures[name] = bootstrap.mean(finite, unit=unit, better="higher")
    return figures


def _floors(runs: Mapping[str, Measured], roles: Roles) -> Figures:
    """How far runs of the reference's model are from each other, in rates and in CLIP score."""
    if not roles.floor or roles.reference is None:
        return {}
    same = [runs[name] for name in (roles.reference, *roles.floor)]
    cases = same[0].images.cases
    figures: Figures = {}
    for index, one in enumerate(same[0].looked.outcomes):
        metric, dot, rest = one.name.partition(".")
        rows = members(cases, one.group)
        counted = [run.looked.outcomes[index].counts[rows] for run in same]
        figures[f"{metric}_floor{dot}{rest}"] = floor(run_differences(counted))
    if "clip_score" in same[0].values:
        for group in dict.fromkeys(case.group for case in cases):
            rows = members(cases, group)
            scores = [run.values["clip_score"][rows] for run in same]
            figures[f"clip_score_floor.{group}"] = floor(run_differences(scores))
    return figures
