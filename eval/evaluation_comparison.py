"""Two evaluations side by side: what they share, how far it is apart, and what only one of them has.

Whether two 95 % intervals overlap is no test: two figures whose intervals overlap may differ all the same, while
chance alone puts intervals apart in less than one case of twenty, and if they are equally wide of a hundred
(Schenker and Gentleman, *On judging the significance of differences by examining the overlap between confidence
intervals*, The American Statistician 55, 2001).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from excise.errors import ArtefactError
from excise.eval.evaluation import FORMAT, Evaluation, Measure, ProtocolRecord, read_evaluation
from excise.eval.evaluation_figures import cell_text, difference_text, measure_names, one_line
from excise.eval.evaluation_page import rendered

#: The document's format.
COMPARISON_FORMAT: Final = 1
_WIDTH = 100
_HEADS = ("A", "B", "B − A", "intervals")
_OVERLAP = {True: "overlap", False: "apart", None: ""}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ComparedMeasure(_Strict):
    """One figure that both evaluations have."""

    protocol: str
    owner: str  #: a runtime, or ``second against first``
    measure: str
    a: Measure
    b: Measure
    difference: float | None  #: B − A; None where one could not be computed, or their units differ
    overlap: bool | None  #: whether the intervals do; None where one of them has none
    change: Literal["better", "worse", "same", "unknown"]  #: of B: a word only where the intervals are apart


class EvaluationComparison(_Strict):
    """The document of ``compare``."""

    format: Literal[1] = COMPARISON_FORMAT
    rows: tuple[ComparedMeasure, ...]
    only_a: tuple[str, ...] = ()  #: protocols, runtimes and measures that B has not
    only_b: tuple[str, ...] = ()
    #: What differs between the two besides their figures, and may be why these do: settings, edits, versions.
    circumstances: tuple[str, ...] = ()


def compare_reports(first: Path, second: Path) -> EvaluationComparison:
    """``compare`` of two ``report.json``, or of the folders that they are in.

    Raises:
        ArtefactError: one of them can't be read, or is of another format.
    """
    return compare(read_evaluation(first), read_evaluation(second))


def compare(a: Evaluation, b: Evaluation) -> EvaluationComparison:
    """Everything that both have, figure by figure; and by name what only one has.

    Raises:
        ArtefactError: one of them is of another format than this version's.
    """
    for name, evaluation in (("A", a), ("B", b)):
        if evaluation.format != FORMAT:
            raise ArtefactError(f"{name} is of format {evaluation.format}, not {FORMAT}: evaluate it again")
    rows: list[ComparedMeasure] = []
    only: tuple[list[str], list[str]] = ([], [])
    differ = [f"machine: {a.machine} and {b.machine}"] if a.machine != b.machine else []
    differ += _differences("version of ", a.versions, b.versions)
    for protocol in _shared("protocol ", [one.name for one in a.protocols], [one.name for one in b.protocols], only):
        one, other = a.protocol(protocol), b.protocol(protocol)
        assert one is not None
        assert other is not None
        differ += _circumstances(one, other)
        mine, theirs = _owners(one), _owners(other)
        for owner in _shared(f"{protocol}: ", list(mine), list(theirs), only):
            x, y = mine[owner], theirs[owner]
            for name in _shared(f"{protocol}, {owner}: ", measure_names([x]), measure_names([y]), only):
                rows.append(_compared(protocol, owner, name, x[name], y[name]))
    return EvaluationComparison(
        rows=tuple(rows), only_a=tuple(only[0]), only_b=tuple(only[1]), circumstances=tuple(differ)
    )


def comparison_text(comparison: EvaluationComparison, names: tuple[str, str] = ("A", "B"), width: int = _WIDTH) -> str:
    """The comparison for a terminal: at most ``width`` columns where the names allow."""
    lines = [f"A: {names[0]}", f"B: {names[1]}", ""]
    for protocol, owners in _tables(comparison).items():
        cells: list[tuple[str, ...]] = [(protocol, *_HEADS)]
        for owner, rows in owners.items():
            cells += [(owner, "", "", "", ""), *((f"  {row.measure}", *_words(row)) for row in rows)]
        wide = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines += [
            "  ".join(
                [
                    line[0].ljust(wide[0]),
                    *(cell.rjust(w) for cell, w in zip(line[1:4], wide[1:4], strict=True)),
                    line[4],
                ]
            ).rstrip()
            for line in cells
        ]
        lines.append("")
    if not comparison.rows:
        lines += ["They share no figure.", ""]
    for label, found in _lists(comparison):
        for text in found:
            lines += textwrap.wrap(f"{label}: {text}", width, subsequent_indent="  ", break_long_words=False)
    return "\n".join(lines).rstrip()


def comparison_page(comparison: EvaluationComparison, names: tuple[str, str] = ("A", "B")) -> str:
    """The comparison as one HTML page: no scripts, nothing fetched, no images.

    Raises:
        MissingExtra: jinja2 isn't installed.
    """
    return rendered(
        "evaluation_comparison.html.jinja",
        names=names,
        protocols=_tables(comparison),
        words=_words,
        lists=[(label, found) for label, found in _lists(comparison) if found],
        apart=sum(row.overlap is False for row in comparison.rows),
        total=len(comparison.rows),
    )


def _compared(protocol: str, owner: str, name: str, a: Measure, b: Measure) -> ComparedMeasure:
    alike = a.unit == b.unit
    difference = b.value - a.value if alike and a.value is not None and b.value is not None else None
    overlap = None
    if alike and a.low is not None and a.high is not None and b.low is not None and b.high is not None:
        overlap = a.low <= b.high and b.low <= a.high
    change: Literal["better", "worse", "same", "unknown"] = "unknown"
    if difference == 0:
        change = "same"
    elif difference is not None and overlap is False and a.better == b.better != "neither":
        change = "better" if (difference < 0) == (a.better == "lower") else "worse"
    return ComparedMeasure(
        protocol=protocol, owner=owner, measure=name, a=a, b=b, difference=difference, overlap=overlap, change=change
    )


def _shared(prefix: str, first: list[str], second: list[str], only: tuple[list[str], list[str]]) -> list[str]:
    """What is in both, in the first's order; the rest goes to ``only``."""
    only[0].extend(prefix + name for name in first if name not in second)
    only[1].extend(prefix + name for name in second if name not in first)
    return [name for name in first if name in second]


def _owners(protocol: ProtocolRecord) -> Mapping[str, Mapping[str, Measure]]:
    return {one.name: one.measures for one in protocol.runtimes} | {
        f"{one.second} against {one.first}": one.measures for one in protocol.comparisons
    }


def _circumstances(a: ProtocolRecord, b: ProtocolRecord) -> list[str]:
    """What the two runs of one protocol were given differently."""
    found = _differences(f"{a.name}: ", {"version": a.version}, {"version": b.version})
    found += _differences(f"{a.name}: setting ", a.settings, b.settings)
    found += _differences(
        f"{a.name}: ", {"base": a.base, "reference": a.reference}, {"base": b.base, "reference": b.reference}
    )
    seen = [{(case.id, case.prompt, case.seed) for case in one.cases} for one in (a, b)]
    if seen[0] != seen[1]:
        found.append(
            f"{a.name}: of its cases, {len(seen[0] - seen[1])} are only in A and {len(seen[1] - seen[0])} only in B"
        )
    for runtime in a.runtimes:
        other = b.runtime(runtime.name)
        if other is not None:
            mine, theirs = (
                {"source": one.source, **one.provenance.model_dump(include={"edit", "manifest", "precision", "intact"})}
                for one in (runtime, other)
            )
            found += _differences(f"{a.name}, {runtime.name}: ", mine, theirs)
    return found


def _differences(prefix: str, a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    return [
        one_line(f"{prefix}{name}: {a.get(name, 'none')} and {b.get(name, 'none')}")
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    ]


def _tables(comparison: EvaluationComparison) -> dict[str, dict[str, list[ComparedMeasure]]]:
    """The rows by protocol and by owner."""
    found: dict[str, dict[str, list[ComparedMeasure]]] = {}
    for row in comparison.rows:
        found.setdefault(row.protocol, {}).setdefault(row.owner, []).append(row)
    return found


def _words(row: ComparedMeasure) -> tuple[str, str, str, str]:
    difference = "" if row.difference is None else difference_text(row.difference, row.b)
    change = f": {row.change}" if row.change in ("better", "worse") else ""
    return cell_text(row.a), cell_text(row.b), difference, _OVERLAP[row.overlap] + change


def _lists(comparison: EvaluationComparison) -> list[tuple[str, tuple[str, ...]]]:
    return [
        ("Only in A", comparison.only_a),
        ("Only in B", comparison.only_b),
        ("Differs", comparison.circumstances),
    ]
