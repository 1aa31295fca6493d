"""Which images explain a failed check, the worst first.

Of a count, a rate or flips: the images with more of it in the judged runtime than in the other, those that the edit
explains least (``relative_to_edit``) first; where too few were counted, as of what is kept, the images with less. Of
any other figure: the images whose own figure, or fall of it, is beyond the bound; where none is, or where an image has
no such figure, the farthest ones, by ``relative_to_edit`` if need be. A variant that is a group, as in
``clip_score.kept``, leaves the other groups' images out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from excise.eval.evaluation import CaseRecord, Finding, ProtocolRecord
from excise.eval.gate_result import FailingImage
from excise.eval.measure_names import COUNTS, OF_COUNTS, OF_FIGURES, metric_of

#: Images that a check names.
SHOWN = 20

RELATIVE = "relative_to_edit"
#: Counts of what is to be kept: an image isn't told by whether the erased concept is in it.
_OF_KEPT = ("recognised",)
#: Endings that only counts have.
_COUNT_ENDINGS = frozenset(OF_COUNTS) - frozenset(OF_FIGURES)

Side = Literal["upper", "lower"]


@dataclass(frozen=True)
class _Figure:
    """A figure's name, taken apart."""

    base: str
    ending: str  #: of a comparison's figure, or nothing
    variant: str  #: with its dot, or nothing

    @classmethod
    def of(cls, name: str) -> _Figure:
        metric = metric_of(name)
        # The longest ending: flips_p_value is no p_value of flips.
        for ending in sorted({*OF_COUNTS, *OF_FIGURES}, key=len, reverse=True):
            if metric.endswith(f"_{ending}") and metric not in COUNTS:
                return cls(metric.removesuffix(f"_{ending}"), ending, name.removeprefix(metric))
        return cls(metric, "", name.removeprefix(metric))

    @property
    def counted(self) -> bool:
        return self.base in COUNTS or self.ending in _COUNT_ENDINGS

    def in_image(self, finding: Finding | None) -> float | None:
        """The image's own figure."""
        if finding is None:
            return None
        for name in (self.base + self.variant, self.base):
            if name in finding.figures:
                return finding.figures[name]
        if self.counted and self.base not in _OF_KEPT and finding.detected is not None:
            return float(finding.detected)
        return None


def failing_images(
    protocol: ProtocolRecord, measure: str, runtime: str, other: str | None, side: Side, limit: float | None = None
) -> tuple[FailingImage, ...]:
    """All images that explain why ``measure`` of ``runtime`` is beyond its bound.

    Args:
        measure: the figure's name.
        other: the runtime that it is judged by, or None.
        side: whether the figure is too high (``upper``) or too low.
        limit: the bound.
    """
    figure = _Figure.of(measure)
    groups = {case.group for case in protocol.cases} & set(figure.variant.split("."))
    cases = [case for case in protocol.cases if runtime in case.findings and (not groups or case.group in groups)]
    other = None if other == runtime else other
    if figure.counted:
        changed = _changed(figure, cases, runtime, other, side)
        if changed is not None:
            return changed
    return _farthest(figure, measure, cases, runtime, other, side, limit)


def _changed(
    figure: _Figure, cases: list[CaseRecord], runtime: str, other: str | None, side: Side
) -> tuple[FailingImage, ...] | None:
    """The images with more, or with less, than the other runtime's; None where images have no such figure."""
    either = figure.ending in ("flips", "flips_p_value")
    less = (side == "upper") == (figure.ending == "drop")
    found: list[tuple[bool, float, str, FailingImage]] = []
    known = False
    for case in cases:
        finding = case.findings[runtime]
        mine = figure.in_image(finding)
        theirs = figure.in_image(case.findings.get(other)) if other is not None else (1.0 if less else 0.0)
        if mine is None or theirs is None:
            continue
        known = True
        change = mine - theirs
        if change == 0 or (not either and (change < 0) != less):
            continue
        why = f"{_seen(finding, mine)}{'' if other is None else f', {theirs:g} in {other}'}"
        if RELATIVE in finding.figures:
            why += f"; {RELATIVE} {finding.figures[RELATIVE]:.3g}"
        image = FailingImage(case=case.id, file=finding.file, why=why)
        found.append((change < 0, -finding.figures.get(RELATIVE, 0.0), case.id, image))
    return tuple(image for *_, image in sorted(found, key=lambda one: one[:3])) if known else None


def _seen(finding: Finding, count: float) -> str:
    return ", ".join(finding.seen) if finding.seen and count else f"{count:g} here"


def _farthest(
    figure: _Figure,
    measure: str,
    cases: list[CaseRecord],
    runtime: str,
    other: str | None,
    side: Side,
    limit: float | None,
) -> tuple[FailingImage, ...]:
    found: list[tuple[float, CaseRecord, str]] = []
    for case in cases:
        mine = figure.in_image(case.findings[runtime])
        theirs = figure.in_image(case.findings.get(other)) if other is not None else None
        if figure.ending == "drop" and mine is not None and theirs is not None:
            found.append((theirs - mine, case, f"{figure.base}{figure.variant} {mine:.4g}, {theirs:.4g} in {other}"))
        elif not figure.ending and mine is not None:
            found.append((mine if side == "upper" else -mine, case, f"{measure} {mine:.4g}"))
    if limit is not None and (beyond := [one for one in found if one[0] > (limit if side == "upper" else -limit)]):
        found = beyond
    elif found:
        found = sorted(found, key=lambda one: (-one[0], one[1].id))[:SHOWN]
    else:
        moved = [(case.findings[runtime].figures.get(RELATIVE), case) for case in cases]
        found = [(far, case, f"{RELATIVE} {far:.3g}") for far, case in moved if far is not None]
        found = sorted(found, key=lambda one: (-one[0], one[1].id))[:SHOWN]
    return tuple(
        FailingImage(case=case.id, file=case.findings[runtime].file, why=why)
        for _, case, why in sorted(found, key=lambda one: (-one[0], one[1].id))
    )
