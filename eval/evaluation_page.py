"""``report.html``: an evaluation for people, one page that needs no network and runs no script.

Thumbnails, plots and style are in the page; the images themselves are addressed by their paths beside it. Flagged
images are veiled as ``evaluation_pictures`` says, and a printed page never shows one.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.errors import MissingExtra
from excise.eval.evaluation import Evaluation, Measure, ProtocolRecord
from excise.eval.evaluation_checks import Check, headline, in_order, outcome, requirement
from excise.eval.evaluation_figures import (
    interval_text,
    is_class,
    measure_names,
    one_line,
    paper_text,
    power_sentences,
    problems,
    roles,
    value_text,
)
from excise.eval.evaluation_pictures import Grid, grids, links
from excise.eval.evaluation_plots import plots

if TYPE_CHECKING:
    import jinja2

#: By which a page of excise's is known from another file of its name.
GENERATOR = "excise evaluation"
#: Picture rows of one protocol; what there is no room for is linked, up to the second figure.
ROWS, LINKED = 24, 200
_PROMPT_SHOWN, _IMAGES_LINKED, _FOLD_FROM = 240, 8, 7


def page(evaluation: Evaluation, folder: Path, verdict: Sequence[Check] | None = None, *, rows: int = ROWS) -> str:
    """The whole page.

    Args:
        folder: where the page will lie; ``Finding.file`` is relative to it.
        verdict: the checks that decide a release; without one, the page says that none was made.
        rows: picture rows of one protocol, at most.

    Raises:
        ArtefactError: an image's name leaves the folder.
        MissingExtra: jinja2 or matplotlib isn't installed.
        UsageError: a check of an unknown status.
    """
    checks = None if verdict is None else in_order(verdict)
    named = {image for check in checks or () if check.status == "failed" for image in check.images}
    flagged = {
        f.file for one in evaluation.protocols for case in one.cases for f in case.findings.values() if f.flagged
    }
    sections = [_section(protocol, folder, named, rows, number) for number, protocol in enumerate(evaluation.protocols)]
    return rendered(
        "evaluation_page.html.jinja",
        evaluation=evaluation,
        outcome=None if checks is None else outcome(checks),
        headline=None if checks is None else headline(checks),
        checks=[] if checks is None else [_check(check, flagged) for check in checks],
        fold=_FOLD_FROM,
        sections=sections,
        flagged=len(flagged),
    )


def rendered(name: str, **context: Any) -> str:
    """A template of this package with its context; everything is escaped, and what is undefined is an error.

    Raises:
        MissingExtra: jinja2 isn't installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "eval") from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clipped"] = clipped
    template: jinja2.Template = environment.get_template(name)
    return template.render(context, generator=GENERATOR)


def clipped(text: str) -> str:
    """A prompt on one line, cut where it would fill the page; ``report.json`` has all of it."""
    line = one_line(text)
    return line if len(line) <= _PROMPT_SHOWN else f"{line[: _PROMPT_SHOWN - 1].rstrip()}…"


def _source(name: str) -> str:
    return importlib.resources.files("excise.eval").joinpath(name).read_text("utf-8")


def _check(check: Check, flagged: set[str]) -> dict[str, Any]:
    images = [(image, image in flagged) for image in list(check.images)[:_IMAGES_LINKED]]
    return {
        "name": check.name,
        "status": check.status,
        "sentence": check.sentence,
        "requirement": requirement(check),
        "images": images,
        "more": max(0, len(check.images) - _IMAGES_LINKED),
    }


def _section(protocol: ProtocolRecord, folder: Path, named: set[str], rows: int, number: int) -> dict[str, Any]:
    """What the template shows of one protocol."""
    role, key = roles(protocol), f"p{number}"
    measures = {runtime.name: runtime.measures for runtime in protocol.runtimes}
    names = measure_names(measures.values())
    published = {figure.measure for figure in protocol.paper} - set(names)
    compared = {f"{one.second} against {one.first}": one.measures for one in protocol.comparisons}
    return {
        "key": key,
        "protocol": protocol,
        "roles": role,
        "table": _cells([*(n for n in names if not is_class(n)), *sorted(published)], measures, protocol),
        "classes": _cells([name for name in names if is_class(name)], measures, protocol),
        "paper": any(figure.measure in published or figure.measure in names for figure in protocol.paper),
        "confidence": _confidences(measures.values()),
        "sources": list(dict.fromkeys(figure.source for figure in protocol.paper)),
        "compared": list(compared),
        "comparisons": _cells(measure_names(compared.values()), compared, None),
        "power": power_sentences(protocol),
        "problems": problems(protocol),
        "provenance": [_provenance(protocol, runtime.name) for runtime in protocol.runtimes],
        "plots": plots(protocol, key),
        "grids": [_grid(grid, protocol) for grid in grids(folder, protocol, named, rows)],
        "settings": {name: _setting(value) for name, value in sorted(protocol.settings.items())},
    }


def _cells(
    names: Sequence[str], columns: Mapping[str, Mapping[str, Measure]], protocol: ProtocolRecord | None
) -> list[dict[str, Any]]:
    """A table's rows: a measure's name and what it is, its cells, and what was published of it."""
    made = []
    for name in names:
        cells = [column.get(name) for column in columns.values()]
        known = next((measure for measure in cells if measure is not None), None)
        notes = [] if known is None else [note for note in (_direction(known.better), known.method) if note]
        figures = [] if protocol is None else [figure for figure in protocol.paper if figure.measure == name]
        made.append(
            {
                "name": name,
                "notes": ", ".join(notes),
                "cells": [
                    {
                        "value": value_text(measure),
                        "interval": interval_text(measure),
                        "n": None if measure is None else measure.n,
                        "missing": measure is not None and measure.value is None,
                    }
                    for measure in cells
                ],
                "paper": [(figure.method, paper_text(figure)) for figure in figures],
            }
        )
    return made


def _confidences(measured: Iterable[Mapping[str, Measure]]) -> str:
    found = {one.confidence for measures in measured for one in measures.values() if one.low is not None}
    return " or ".join(f"{100 * confidence:g} %" for confidence in sorted(found)) or "95 %"


def _direction(better: str) -> str:
    return "" if better == "neither" else f"{better} is better"


def _provenance(protocol: ProtocolRecord, name: str) -> dict[str, Any]:
    runtime = protocol.runtime(name)
    assert runtime is not None
    reference = protocol.runtime(protocol.reference) if protocol.reference is not None else None
    edit = runtime.provenance.edit
    same = None
    if reference is not None and reference is not runtime and edit is not None:
        same = edit == reference.provenance.edit
    return {"runtime": runtime, "role": roles(protocol)[name], "same": same}


def _grid(grid: Grid, protocol: ProtocolRecord) -> dict[str, Any]:
    order = [runtime.name for runtime in protocol.runtimes]
    return {
        "group": grid.group,
        "rows": grid.rows,
        "total": len(grid.rows) + len(grid.others),
        "others": [(case, links(case, order)) for case in grid.others[:LINKED]],
        "unlisted": max(0, len(grid.others) - LINKED),
    }


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_setting(inner)}" for name, inner in sorted(value.items()))
    if isinstance(value, list | tuple):
        return "; ".join(_setting(inner) for inner in value)
    return "none" if value is None else str(value)
