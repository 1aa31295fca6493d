"""What a runtime's figures are beside the unedited and the edited model's, case by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from excise.errors import UsageError
from excise.eval.evaluation import Comparison, Measure
from excise.eval.floor import floor, run_differences
from excise.eval.pixel_movement import Movements
from excise.eval.protocol_distances import apart, features_p_value
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_measures import (
    Figures,
    Real,
    groups_of,
    members,
    named,
    of_movement,
    of_pair,
    of_value_pair,
)
from excise.eval.protocol_models import ProtocolModels
from excise.eval.run_images import Looked, RunImages


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
        for name in self.floor:
            if name == self.reference:
                raise UsageError(f"--floor {name}: it is the reference itself: name a run of its model in another way")
            if self.floor.count(name) > 1:
                raise UsageError(f"--floor {name} is given twice")


@dataclass
class Measured:
    """What is known of one runtime."""

    images: RunImages
    looked: Looked
    values: dict[str, Real] = field(default_factory=dict)  #: figures of each image, by the metric's name
    figures: Figures = field(default_factory=dict)


def moved_pairs(names: Sequence[str], roles: Roles, protocol: ProtocolFile) -> list[tuple[str, str]]:
    """Whose pixels are compared: the edit's movement, every other runtime with the edited model's, and, where a
    protocol asks for PSNR against it, all with the unedited model's."""
    if any(metric.name == "psnr" and "base" in metric.against for metric in protocol.metrics):
        return compared_pairs(names, roles)
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
    for metric in protocol.metrics:
        if metric.name == "clip_score":
            a, b = (run.values["clip_score"] for run in (first, second))
            figures |= of_value_pair(metric, a, b, cases, unit=models.clip(metric.model or "").name)
    if pair[0] != roles.reference:
        return Comparison(first=pair[0], second=pair[1], measures=figures)
    edit = squared.get((roles.base or "", roles.reference or ""))
    if edit is None:
        why = "no runtime is the base"
        figures["relative_to_edit"] = Measure(value=None, n=0, unit="of the edit", better="lower", error=why)
    else:
        figures["relative_to_edit"] = of_movement(squared[pair], edit)
        if floors := [squared[roles.reference, name] for name in roles.floor if name != pair[1]]:
            figures["relative_to_edit_floor"] = of_movement(np.max(floors, axis=0), edit)
    for metric in protocol.metrics:
        if "reference" not in metric.against:
            continue
        found, values = apart(metric, "reference", first.images, second.images, models, squared, size)
        figures |= found
        # An image's own LPIPS is the one to the unedited model's, where that is asked for too.
        second.values = values | second.values
        if metric.name in ("fid", "kid") and "features_p_value" not in figures:
            figures["features_p_value"] = features_p_value(metric, first.images, second.images, models)
    figures |= _floors(protocol, runs, roles)
    return Comparison(first=pair[0], second=pair[1], measures=figures)


def _floors(protocol: ProtocolFile, runs: Mapping[str, Measured], roles: Roles) -> Figures:
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
    for wanted in protocol.metrics:
        if wanted.name == "clip_score":
            for group in groups_of(wanted):
                rows = members(cases, group)
                scores = [run.values["clip_score"][rows] for run in same]
                figures[named("clip_score_floor", group)] = floor(run_differences(scores))
    return figures
