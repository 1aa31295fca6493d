"""The report of a verification: a table, ``report.json`` for machines, a picture, and how to get it again."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excise.eval.verification import Verification
from excise.eval.verification_measures import OUTPUTS
from excise.eval.verification_verdict import Row
from excise.manifest import tool_versions
from excise.output import new_folder

FILES = ("report.json", "trajectory.png", "reproduce.sh")
_PACKAGES = ("excise", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "diffusers", "transformers")
_COLUMNS = ("output", "prompts", "worst at", "max abs", "relative", "cosine", "moved", "to move", "limit", "")
_FAILURES_SHOWN = 5


def as_json(done: Verification, command: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured, in a fixed order; ``command`` gives the same figures again."""
    return {
        "format": 1,
        "passed": done.passed,
        **done.model_dump(mode="json", exclude={"rows"}),
        "versions": {**tool_versions(_PACKAGES), "python": platform.python_version(), "machine": platform.machine()},
        "command": list(command),
        "rows": [row.model_dump(mode="json") for row in done.rows],
    }


def worst_rows(done: Verification) -> list[Row]:
    """Of each output on each group the row that is nearest to its limit or furthest beyond, in order."""
    worst: dict[tuple[str, str], Row] = {}
    for row in done.rows:
        key = (row.output, row.group)
        if key not in worst or row.used > worst[key].used:
            worst[key] = row
    order = list(OUTPUTS)
    return sorted(worst.values(), key=lambda row: order.index(row.output))


def table(done: Verification) -> str:
    """The verdict for people: each output's worst row, what failed, and what the sides computed in."""
    lines = [_COLUMNS, *(_cells(row) for row in worst_rows(done))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.append("")
    for name, side in (("A", done.a), ("B", done.b), ("base", done.base)):
        text.append(f"{name:<5} {side.side}" + (f"  (edit {side.edit[:12]})" if side.edit else ""))
        text += [f"        {component:<14} {precision}" for component, precision in side.precision.items()]
    text.append(
        "relative is |B - A| / |A|, moved |A - base| / |A|, to move |B - A| / |A - base|; the limits are those of "
        f"{done.rounding}, times the edit's move or the output's norm, whichever allows more"
    )
    for row in done.failures[:_FAILURES_SHOWN]:
        text.append(f"FAILED  {row.output} on {row.group} prompts{_place(row)}: {row.reason}")
    if more := len(done.failures) - _FAILURES_SHOWN:
        text += [f"        and {more} more outputs"] if more > 0 else []
    verdict = "B computes what A does" if done.passed else f"B differs from A in {len(done.failures)} outputs"
    text.append(f"{'passed' if done.passed else 'failed'}: {verdict} ({len(done.rows)} outputs compared)")
    return "\n".join(text)


def _place(row: Row) -> str:
    return "" if row.at is None else f", {'timestep' if row.output == 'denoiser' else 'step'} {row.at}"


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    to_move = "not moved" if row.to_move is None and row.relative is not None else number(row.to_move)
    return (
        row.output,
        row.group,
        "" if row.at is None else str(row.at),
        number(row.max_abs),
        number(row.relative),
        "-" if row.cosine is None else f"{row.cosine:.7f}",
        number(row.moved),
        to_move,
        f"{row.limit:g} x {'move' if row.decided_by == 'to_move' else 'norm'}",
        "ok" if row.passed else "FAILED",
    )


def write_report(folder: Path, done: Verification, command: Sequence[str]) -> None:
    """Write ``FILES`` into the new folder, which appears whole or not at all.

    Args:
        command: Arguments of ``excise`` that give the same figures again, without ``--out``.

    Raises:
        OutputError: ``folder`` holds something already, or can't be written.
    """
    with new_folder(folder) as partial:
        document = json.dumps(as_json(done, command), indent=1, ensure_ascii=False, allow_nan=False)
        (partial / "report.json").write_text(document + "\n", encoding="utf-8")
        _draw(partial / "trajectory.png", done)
        script = partial / "reproduce.sh"
        script.write_text(reproduce(done, command), encoding="utf-8")
        script.chmod(0o755)


def reproduce(done: Verification, command: Sequence[str]) -> str:
    """A shell script that measures the same again, from the folder in which the command was given."""
    made = {**tool_versions(_PACKAGES), "python": platform.python_version()}
    settings = dataclasses.asdict(done.settings)
    return "\n".join(
        [
            "#!/bin/sh",
            "# Gives the figures of report.json again. Run it where the command was given: folders are named from",
            "# there. The result goes to the new folder that is its argument.",
            "# made with  " + ", ".join(f"{name} {version}" for name, version in made.items()),
            "# settings   " + ", ".join(f"{name} {value}" for name, value in settings.items()),
            "set -eu",
            'if [ $# -ne 1 ]; then echo "usage: $0 NEW_FOLDER" >&2; exit 2; fi',
            f'exec excise {shlex.join(command)} --out "$1"',
            "",
        ]
    )


def _draw(path: Path, done: Verification) -> None:
    """One panel a group: the error after each step, with the distance that the edit moved beside it."""
    from matplotlib.figure import Figure

    groups = list(done.prompts)
    figure = Figure(figsize=(4.2 * len(groups), 3.6), layout="constrained")
    shared = None
    for number, group in enumerate(groups, 1):
        rows = [row for row in done.rows if row.output == "latents" and row.group == group]
        shared = axes = figure.add_subplot(1, len(groups), number, sharey=shared)
        steps = list(range(1, len(rows) + 1))
        # NaN leaves a gap: an exact step has no place on a logarithmic axis, and one that isn't finite has no figure
        errors = [row.relative or math.nan for row in rows]
        axes.plot(steps, [row.moved or math.nan for row in rows], "s--", color="#c8553d", label="moved by the edit")
        axes.plot(steps, errors, "o-", color="#1b6ca8", label="error of B")
        axes.set(yscale="log", xlabel="step", title=f"{group} prompts")
        if number == 1:
            axes.set_ylabel("relative to the latents of A")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=140)
