"""The wording of an evaluation's figures, the same in every report.

A measure is named ``metric``, ``metric.variant`` or ``metric.variant.class``, as in ``nude_parts.RECE.BELLY_EXPOSED``:
three parts are one class of a count, which tables leave out or fold away and plots show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from excise.eval.evaluation import Measure, PaperFigure, ProtocolRecord

#: The units of figures of what was detected; they come first.
COUNTED = ("count", "fraction")
NOT_COMPUTED = "not computed"
_MOST_DECIMALS = 6


def is_class(name: str) -> bool:
    """Whether a measure's name is that of one class of a count."""
    return name.count(".") > 1


def measure_names(measured: Iterable[Mapping[str, Measure]]) -> list[str]:
    """The names of all measures, in an order that depends on nothing but them: counts and fractions first."""
    rank: dict[str, bool] = {}
    for measures in measured:
        for name, measure in measures.items():
            rank[name] = rank.get(name, True) and measure.unit not in COUNTED
    return sorted(rank, key=lambda name: (rank[name], name))


def value_text(measure: Measure | None) -> str:
    """The figure, such as ``66``, ``6.4 %`` or ``31.2 dB``; its last digit is one that its interval leaves in doubt."""
    if measure is None:
        return ""
    if measure.value is None:
        return NOT_COMPUTED
    unit = {"fraction": "%", "count": ""}.get(measure.unit, measure.unit)
    return f"{_number(measure.value, measure)} {unit}".rstrip()


def interval_text(measure: Measure | None) -> str:
    """The interval in the value's unit, such as ``[51, 84]``, or nothing."""
    if measure is None or (measure.low is None and measure.high is None):
        return ""
    ends = ["…" if end is None else _number(end, measure) for end in (measure.low, measure.high)]
    return f"[{', '.join(ends)}]"


def cell_text(measure: Measure | None) -> str:
    """The figure and its interval, such as ``66 [51, 84]``."""
    return f"{value_text(measure)} {interval_text(measure)}".strip()


def difference_text(difference: float, measure: Measure) -> str:
    """A difference of two such figures with its sign; of fractions in points of a hundred."""
    unit = {"fraction": "points", "count": ""}.get(measure.unit, measure.unit)
    return f"{_number(difference, measure, '+')} {unit}".rstrip()


def paper_text(figure: PaperFigure) -> str:
    """A published figure as published."""
    return f"{figure.value:g}"


def roles(protocol: ProtocolRecord) -> dict[str, str]:
    """What each runtime is, by name: ``base``, ``reference`` or ``judged``."""
    special = {protocol.base: "base", protocol.reference: "reference"}
    return {runtime.name: special.get(runtime.name, "judged") for runtime in protocol.runtimes}


def known_measure(protocol: ProtocolRecord, runtime: str, name: str) -> Measure | None:
    """A runtime's measure, if it could be computed."""
    record = protocol.runtime(runtime)
    measure = record.measures.get(name) if record is not None else None
    return measure if measure is not None and measure.value is not None else None


def power_sentences(protocol: ProtocolRecord) -> list[str]:
    """What the number of images can tell, one sentence a count."""
    sentences = []
    for name in sorted(protocol.power):
        least = protocol.power[name]
        if least.value is None:
            sentences.append(
                f"The power for {name} could not be computed: {one_line(least.error or 'no reason given')}."
            )
        else:
            sentences.append(
                f"With {least.n} images, an increase of {name} by {value_text(least)} or more would be caught with "
                "95 % probability; a smaller one may pass unseen."
            )
    return sentences


def problems(protocol: ProtocolRecord) -> list[str]:
    """Each figure that could not be computed, and why."""
    owners = [(f"in {runtime.name}", runtime.measures) for runtime in protocol.runtimes]
    owners += [(f"of {one.second} against {one.first}", one.measures) for one in protocol.comparisons]
    return [
        f"{name} {owner}: {one_line(measures[name].error or 'no reason given')}"
        for owner, measures in owners
        for name in sorted(measures)
        if measures[name].value is None
    ]


def one_line(text: str) -> str:
    """``text`` without line breaks, runs of spaces and what would steer a terminal."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _number(value: float, measure: Measure, sign: str = "") -> str:
    """Two digits of the interval's width; where there is none, four digits; whole counts as they are."""
    value = 100 * value if measure.unit == "fraction" else value
    if measure.unit == "count" and all(x is None or x == round(x) for x in (value, measure.low, measure.high)):
        return f"{value:{sign}.0f}"
    width = 0.0 if measure.low is None or measure.high is None else measure.high - measure.low
    if width <= 0:
        return f"{value:{sign}.4g}" if abs(value) < 1e4 else f"{value:{sign}.0f}"
    width = 100 * width if measure.unit == "fraction" else width
    decimals = min(_MOST_DECIMALS, max(0, 1 - math.floor(math.log10(width))))
    return f"{value:{sign}.{decimals}f}"
