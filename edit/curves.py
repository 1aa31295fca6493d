"""Pictures of an edit's figures: margin and movement by epoch (the paper's Fig. 5), and over λ (its Fig. 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from excise.editmetadata import StageFigures
from excise.output import new_file

_MARGIN, _MOVED, _RESIDUAL, _DETECTED = "#1b6ca8", "#c8553d", "#7a7a7a", "#3a7d44"


def draw_stages(path: Path, stages: Sequence[StageFigures]) -> None:
    """One panel a stream: what each stage gained, and what it cost. A stage that was left out is hollow.

    Raises:
        OutputError: ``path`` exists or can't be written.
    """
    streams = list(dict.fromkeys(stage.stream for stage in stages))
    figure = Figure(figsize=(6.4, 3.6 * len(streams)), layout="constrained")
    for number, stream in enumerate(streams, 1):
        shown = [stage for stage in stages if stage.stream == stream]
        axes = figure.add_subplot(len(streams), 1, number)
        places = list(range(len(shown)))
        for label, colour, values in (
            ("margin at 1× the norm", _MARGIN, [stage.margin for stage in shown]),
            ("regeneration error before the epoch", _RESIDUAL, [stage.residual for stage in shown]),
            ("share of pictures with the concept", _DETECTED, [stage.detected for stage in shown]),
        ):
            known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colour, label=label, zorder=2)
                for place, value in known:
                    face = colour if shown[place].accepted else "white"
                    axes.plot(place, value, "o", color=colour, markerfacecolor=face, zorder=3)
        axes.set(xticks=places, xticklabels=[stage.stage for stage in shown], ylabel="relative error", title=stream)
        axes.set_ylim(bottom=0)
        right = axes.twinx()
        right.plot(places, [stage.moved for stage in shown], "s--", color=_MOVED, label="kept prompts moved")
        right.set_ylabel("relative movement of kept prompts", color=_MOVED)
        right.set_ylim(bottom=0)
        lines = [*axes.get_lines(), *right.get_lines()]
        named = [line for line in lines if not str(line.get_label()).startswith("_")]
        axes.legend(named, [str(line.get_label()) for line in named], fontsize=8, loc="best")
    _save(figure, path)


def draw_sweep(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Margin against movement, a point for each λ.

    Args:
        points: each with ``ridge``, ``margin`` and ``moved``.

    Raises:
        OutputError: ``path`` exists or can't be written.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([p["moved"] for p in points], [p["margin"] for p in points], "o-", color=_MARGIN)
    for point in points:
        axes.annotate(
            f"λ = {point['ridge']:g}", (point["moved"], point["margin"]), xytext=(6, 4), textcoords="offset points"
        )
    axes.set(xlabel="relative movement of kept prompts (cost)", ylabel="margin at 1× the norm (worth)")
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as partial:
        figure.savefig(partial, dpi=160, format=path.suffix[1:])
