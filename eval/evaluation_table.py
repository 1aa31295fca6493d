"""An evaluation as plain text for a terminal, and the wording of its figures, which every other report uses too.

A measure is named ``metric``, ``metric.variant`` or ``metric.variant.class``, as in ``nude_parts.RECE.BELLY_EXPOSED``:
three parts are one class of a count, which a table leaves out and a plot shows.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from excise.eval.evaluation import Evaluation, Measure, PaperFigure, ProtocolRecord
from excise.eval.evaluation_checks import Check, headline, in_order, printed

#: The units of figures of what was detected; they come first.
COUNTED = ("count", "fraction")
NOT_COMPUTED, ABSENT = "not computed", ""
_WIDTH, _SIGNIFICANT, _MOST_DECIMALS, _INDENT = 100, 4, 6, "  "
_STATE = {"passed": "pass", "failed": "FAIL", "skipped": "skip"}


def is_class(name: str) -> bool:
    """Whether a measure's name is that of one class of a count."""
    return name.count(".") > 1


def measure_names(measured: Iterable[dict[str, Measure]]) -> list[str]:
    """The names of all measures, in an order that depends on nothing but them: counts and fractions first."""
    rank: dict[str, bool] = {}
    for measures in measured:
        for name, measure in measures.items():
            rank[name] = rank.get(name, True) and measure.unit not in COUNTED
    return sorted(rank, key=lambda name: (rank[name], name))


def value_text(measure: Measure | None) -> str:
    """The figure, such as ``66``, ``6.4 %`` or ``31.2 dB``; its last digit is one that its interval leaves in doubt."""
    if measure is None:
        return ABSENT
    if measure.value is None:
        return NOT_COMPUTED
    number = f"{_scale(measure) * measure.value:.{_decimals(measure)}f}"
    unit = {"fraction": "%", "count": ""}.get(measure.unit, measure.unit)
    return f"{number} {unit}".rstrip()


def interval_text(measure: Measure | None) -> str:
    """The interval in the value's unit, such as ``[51, 84]``, or nothing."""
    if measure is None or (measure.low is None and measure.high is None):
        return ""
    ends = ["…" if end is None else f"{_scale(measure) * end:.{_decimals(measure)}f}" for end in _ends(measure)]
    return f"[{', '.join(ends)}]"


def cell_text(measure: Measure | None) -> str:
    """The figure and its interval, such as ``66 [51, 84]``."""
    return f"{value_text(measure)} {interval_text(measure)}".strip()


def difference_text(difference: float, measure: Measure) -> str:
    """A difference of two such figures with its sign; of fractions in points of a hundred."""
    number = f"{_scale(measure) * difference:+.{_decimals(measure)}f}"
    unit = {"fraction": "points", "count": ""}.get(measure.unit, measure.unit)
    return f"{number} {unit}".rstrip()


def paper_text(figure: PaperFigure) -> str:
    """A published figure as published."""
    return f"{figure.value:g}"


def roles(protocol: ProtocolRecord) -> dict[str, str]:
    """What each runtime is, by name: ``base``, ``reference`` or ``judged``."""
    special = {protocol.base: "base", protocol.reference: "reference"}
    return {runtime.name: special.get(runtime.name, "judged") for runtime in protocol.runtimes}


def power_sentences(protocol: ProtocolRecord) -> list[str]:
    """What the number of images can tell, one sentence a count."""
    sentences = []
    for name in sorted(protocol.power):
        least = protocol.power[name]
        if least.value is None:
            sentences.append(f"The power for {name} could not be computed: {_line(least.error or 'no reason given')}.")
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
        f"{name} {owner}: {_line(measures[name].error or 'no reason given')}"
        for owner, measures in owners
        for name in sorted(measures)
        if measures[name].value is None
    ]


def table(evaluation: Evaluation, verdict: Sequence[Check] | None = None, *, width: int = _WIDTH) -> str:
    """The figures, and the verdict if there is one: at most ``width`` columns where the names allow."""
    lines: list[str] = []
    for protocol in evaluation.protocols:
        lines += [f"{protocol.name} {protocol.version}: {_line(protocol.title)}", *_figures(protocol, width)]
        for comparison in protocol.comparisons:
            if names := [name for name in measure_names([comparison.measures]) if not is_class(name)]:
                lines += ["", f"{comparison.second} against {comparison.first}"]
                rows = [[name, cell_text(comparison.measures[name])] for name in names]
                lines += _aligned([["", ""], *rows])[1:]
        lines += _paragraphs("Published, another model: ", _published(protocol), width)
        lines += _paragraphs("", power_sentences(protocol), width)
        lines += _paragraphs("Not computed: ", problems(protocol), width)
        for runtime in protocol.runtimes:
            if runtime.provenance.intact is False:
                lines += _paragraphs("NOT INTACT: ", [f"{runtime.name} is not as its manifest says"], width)
        lines += ["", ""]
    if verdict is not None:
        lines += [*_verdict(verdict, width), ""]
    return "\n".join(lines).rstrip()


def _figures(protocol: ProtocolRecord, width: int) -> list[str]:
    """Measures down, runtimes across, in as many blocks as the width asks for."""
    names = [name for name in measure_names(one.measures for one in protocol.runtimes) if not is_class(name)]
    role = roles(protocol)
    columns = [
        [runtime.name + (f" ({role[runtime.name]})" if role[runtime.name] != "judged" else "")]
        + [cell_text(runtime.measures.get(name)) for name in names]
        for runtime in protocol.runtimes
    ]
    first = ["", *names]
    blocks: list[list[list[str]]] = [[]]
    for column in columns:
        if blocks[-1] and len(_aligned(_transposed([first, *blocks[-1], column]))[0]) > width:
            blocks.append([])
        blocks[-1].append(column)
    return [line for block in blocks for line in ["", *(row.rstrip() for row in _aligned(_transposed([first, *block])))]]


def _verdict(verdict: Sequence[Check], width: int) -> list[str]:
    lines = []
    for check in in_order(verdict):
        bound = "" if check.bound is None else f", bound {printed(check.bound)}"
        lines.append(f"{_STATE[check.status]}  {check.name}: measured {printed(check.measured)}{bound}")
        if check.status != "passed":
            lines += textwrap.wrap(
                _line(check.sentence), width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_long_words=False
            )
            lines += [f"      {image}" for image in list(check.images)[:5]]
            if len(check.images) > 5:
                lines.append(f"      and {len(check.images) - 5} more images")
    return [*lines, "", headline(verdict)]


def _published(protocol: ProtocolRecord) -> list[str]:
    by_measure: dict[tuple[str, str], list[str]] = {}
    for figure in protocol.paper:
        by_measure.setdefault((figure.measure, figure.source), []).append(f"{figure.method} {paper_text(figure)}")
    return [f"{measure}: {', '.join(found)} ({source})" for (measure, source), found in by_measure.items()]


def _paragraphs(label: str, sentences: Sequence[str], width: int) -> list[str]:
    lines = []
    for sentence in sentences:
        lines += textwrap.wrap(label + sentence, width, subsequent_indent=_INDENT, break_long_words=False)
    return ["", *lines] if lines else []


def _transposed(columns: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(row) for row in zip(*columns, strict=True)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows padded to equal columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _scale(measure: Measure) -> float:
    return 100.0 if measure.unit == "fraction" else 1.0


def _ends(measure: Measure) -> tuple[float | None, float | None]:
    return measure.low, measure.high


def _decimals(measure: Measure) -> int:
    """Two digits of the interval's width, or four of the value where there is no interval; a count has its own digits."""
    if measure.unit == "count" and all(x is None or x == round(x) for x in (measure.value, *_ends(measure))):
        return 0
    width = 0.0 if measure.low is None or measure.high is None else measure.high - measure.low
    size, digits = (width, 2) if width > 0 else (abs(measure.value or 0.0), _SIGNIFICANT)
    if not size:
        return 0
    return min(_MOST_DECIMALS, max(0, digits - 1 - math.floor(math.log10(_scale(measure) * size))))


def _line(text: str) -> str:
    return " ".join(text.split())
