"""An evaluation as plain text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from excise.eval.evaluation import Evaluation, ProtocolRecord
from excise.eval.evaluation_checks import Check, headline, in_order, requirement
from excise.eval.evaluation_figures import (
    cell_text,
    is_class,
    measure_names,
    one_line,
    paper_text,
    power_sentences,
    problems,
    roles,
)

_WIDTH, _INDENT, _IMAGES_SHOWN = 100, "  ", 5
_STATE = {"passed": "pass", "failed": "FAIL", "skipped": "skip"}


def table(evaluation: Evaluation, verdict: Sequence[Check] | None = None, *, width: int = _WIDTH) -> str:
    """The figures, and the verdict if there is one: at most ``width`` columns where the names allow."""
    lines: list[str] = []
    for protocol in evaluation.protocols:
        lines += [f"{protocol.name} {protocol.version}: {one_line(protocol.title)}", *_figures(protocol, width)]
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
    return [line for block in blocks for line in ["", *_aligned(_transposed([first, *block]))]]


def _verdict(verdict: Sequence[Check], width: int) -> list[str]:
    lines = []
    for check in in_order(verdict):
        lines.append(f"{_STATE[check.status]}  {check.name}: {requirement(check)}".removesuffix(": "))
        if check.status != "passed":
            lines += textwrap.wrap(
                one_line(check.sentence),
                width,
                initial_indent=" " * 6,
                subsequent_indent=" " * 6,
                break_long_words=False,
            )
            lines += [f"      {image}" for image in list(check.images)[:_IMAGES_SHOWN]]
            if len(check.images) > _IMAGES_SHOWN:
                lines.append(f"      and {len(check.images) - _IMAGES_SHOWN} more images")
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
    first, *others = widths
    return [
        "  ".join(
            [row[0].ljust(first), *(cell.rjust(wide) for cell, wide in zip(row[1:], others, strict=True))]
        ).rstrip()
        for row in rows
    ]
