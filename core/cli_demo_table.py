"""``excise eval demo-table``: erasers and attacks of the paper on the bundled model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from excise.cli_solve import solve
from excise.console import needs, result, say
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.edit.recipe import Recipe
    from excise.editfile import Edit

#: What ``--set`` may hold.
_SET = ("rows", "artist_rows", "attacks", "attacked")


def make_demo_table(
    out: Path | None,
    chosen: Mapping[str, str],
    *,
    cases: int | None,
    steps: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Make the table, or go on with it, and print it.

    Args:
        out: its folder.
        chosen: ``rows``, ``artist_rows`` and ``attacks`` by name, with commas, or ``none``; ``attacked``, a number.
        cases: so many of each protocol's prompts; None takes all.
        steps: denoising steps; None takes the protocols' own.
        batch_size: images together.
        as_json: print the document in place of the text.

    Raises:
        UsageError: no folder, or a choice that there isn't.
        ExciseError: as the parts raise.
    """
    if out is None:
        raise UsageError("--out FOLDER is missing")
    if unknown := sorted(set(chosen) - set(_SET)):
        raise UsageError(f"--set {unknown[0]}: demo-table takes {', '.join(_SET)}")
    with needs("eval"):
        from excise.demo.table import TEXT, DemoTable, demo_table, plans
        from excise.demo.table_rows import ARTIST_ROWS, BUDGETS, ROWS
        from excise.export.pipeline import load_pipeline
    rows = _names("rows", chosen, tuple(ROWS))
    if rows[:1] != ("base",):
        raise UsageError("--set rows: start with base, the unedited model")
    attacked = chosen.get("attacked", "12")
    if not (attacked.isascii() and attacked.isdigit() and int(attacked)):
        raise UsageError(f"--set attacked={attacked}: give a number of prompts")
    names = _names("attacks", chosen, tuple(BUDGETS))
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **options: say(str(message))
        document, text = demo_table(
            DemoTable(
                folder=out,
                solve=_solve,
                load_pipeline=load_pipeline,
                attacks=plans(out, names),
                rows=rows,
                artist_rows=_names("artist_rows", chosen, tuple(ARTIST_ROWS)),
                cases=cases,
                attacked=int(attacked),
                steps=steps,
                batch_size=batch_size,
                say=say,
            )
        )
    result(document, f"{text}\n{out / TEXT}", as_json)


def _solve(recipe: Recipe, checkpoints: Path) -> Edit:
    return solve("demo:model", recipe, "cpu", certificate=False, cached=True, checkpoints=checkpoints)


def _names(option: str, chosen: Mapping[str, str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Some of the known names; all where nothing was chosen."""
    if option not in chosen:
        return known
    names = tuple(name for name in chosen[option].split(",") if name and name != "none")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--set {option}: {unknown[0]!r} is none of {', '.join(known)}")
    return names
