"""``report.json`` for machines and ``report.html`` for people, beside the images that they speak of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from excise.errors import OutputError, UsageError
from excise.eval.evaluation import Evaluation
from excise.eval.evaluation_checks import Check
from excise.eval.evaluation_page import GENERATOR, ROWS, page
from excise.output import put_in_place

JSON, HTML = "report.json", "report.html"


def write_evaluation(
    folder: Path,
    evaluation: Evaluation,
    verdict: Sequence[Check] | None = None,
    *,
    rows: int = ROWS,
    replace: bool = False,
) -> dict[str, Path]:
    """Write ``report.json`` and ``report.html`` into the folder that holds the images; their paths by name.

    A page of excise's own is written anew, so that a verdict can be added later. An equal ``report.json`` stays as it
    is; each file appears whole or not at all.

    Args:
        verdict: the checks of a gate; without them the page has figures only.
        rows: picture rows of one protocol, at most.
        replace: let another ``report.json`` be replaced.

    Raises:
        ArtefactError: an image's name leaves the folder.
        MissingExtra: jinja2 or matplotlib isn't installed.
        OutputError: the folder holds another evaluation or another page, doesn't exist, or can't be written.
        UsageError: a setting that JSON has no word for, or a check of an unknown status.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder: a report is written beside its images")
    content = as_json(evaluation)
    paths = {name: folder / name for name in (JSON, HTML)}
    if not replace and paths[JSON].exists() and _content(paths[JSON]) != content:
        raise OutputError(f"{paths[JSON]} is of another evaluation: choose another folder, or remove it")
    if paths[HTML].exists() and _marked() not in _content(paths[HTML]):
        raise OutputError(f"{paths[HTML]} is no page of excise's: choose another folder, or remove it")
    shown = page(evaluation, folder, verdict, rows=rows).encode()
    for path, data in ((paths[JSON], content), (paths[HTML], shown)):
        write_anew(path, data)
    return paths


def as_json(evaluation: Evaluation) -> bytes:
    """The document's bytes: equal evaluations give equal bytes, in whatever order their figures were put in.

    Raises:
        UsageError: a setting that JSON has no word for.
    """
    # As JSON, pydantic would write null for a setting that is no number.
    document = evaluation.model_dump(mode="python")
    try:
        return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"the evaluation can't be written as JSON: {error}") from error


def write_anew(path: Path, content: bytes) -> None:
    """Put a file in the place of one of the same name, in one step.

    Raises:
        OutputError: the folder can't be written, or the disk is full.
    """
    try:
        put_in_place(path, content)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path} can't be read: {error.strerror}") from error


def _marked() -> bytes:
    return f'<meta name="generator" content="{GENERATOR}">'.encode()
