"""An ablation's plot: what is still detected, and what is kept, over the figure that its edits differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from excise.eval.evaluation import Measure, ProtocolRecord
from excise.eval.evaluation_figures import COUNTED, cell_text, is_class, known_measure, measure_names
from excise.eval.evaluation_svg import INK, SERIES, Plot, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Inches, of one figure's panel.
_PANEL: Final = 1.25
#: Figures that are drawn: so many of what is counted, and one of each of the others, of the kept prompts if it can be.
_MOST_COUNTED: Final = 2
_OTHERS: Final = ("clip_score", "fid", "lpips", "psnr")
_LABELS: Final = {"epochs": "epochs of RECE", "ridge": "λ of RECE's eq. 8"}


def sweep_figures(protocol: ProtocolRecord) -> tuple[str, ...]:
    """The figures that the plot shows, by name."""
    names = [name for name in measure_names(one.measures for one in protocol.runtimes) if not is_class(name)]
    units = {name: one.unit for runtime in protocol.runtimes for name, one in runtime.measures.items()}
    counted = [name for name in names if units[name] in COUNTED][:_MOST_COUNTED]
    others = []
    for metric in _OTHERS:
        found = [name for name in names if name.partition(".")[0] == metric]
        others += sorted(found, key=lambda name: ("kept" not in name.split("."), name))[:1]
    return tuple(name for name in (*counted, *others) if _points(protocol, name))


def sweep_plots(protocol: ProtocolRecord, key: str) -> list[Plot]:
    """The plot; none where the record is of no sweep, or has no figures.

    Args:
        key: begins the ids in the element; unique on the page.

    Raises:
        MissingExtra: matplotlib isn't installed.
    """
    if protocol.sweep is None or not (figures := sweep_figures(protocol)):
        return []
    found = {name: _points(protocol, name) for name in figures}
    base = {name: known_measure(protocol, protocol.base or "", name) for name in figures}
    label = _LABELS[protocol.sweep.parameter]

    def draw(panels: Sequence[Axes]) -> None:
        for axes, (name, points) in zip(panels, found.items(), strict=True):
            _panel(axes, name, points, base[name])
        panels[-1].set_xlabel(label)
        if protocol.sweep is not None and protocol.sweep.parameter == "ridge":
            panels[-1].set_xscale("log")
        else:
            panels[-1].locator_params(axis="x", integer=True)

    words = "; ".join(
        f"{name}: "
        + ", ".join(f"{cell_text(measure)} at {value:g}" for value, measure in points.items())
        + ("" if (unedited := base[name]) is None else f", {cell_text(unedited)} unedited")
        for name, points in found.items()
    )
    title = f"Over {label}"
    description = f"Points with their intervals; the dashed line is the unedited model. {words}."
    svg = drawn(len(found), 0.5 + _PANEL * len(found), draw, title, description, key)
    return [Plot(title, description, svg)]


def _panel(axes: Axes, name: str, points: Mapping[float, Measure], base: Measure | None) -> None:
    scale = 100.0 if any(measure.unit == "fraction" for measure in points.values()) else 1.0
    values = [scale * (measure.value or 0.0) for measure in points.values()]
    axes.plot(list(points), values, "o-", color=SERIES[2], linewidth=1.2, markersize=5)
    for value, measure in points.items():
        if measure.low is not None and measure.high is not None:
            axes.plot([value, value], [scale * measure.low, scale * measure.high], color=SERIES[2], linewidth=1.6)
    if base is not None and base.value is not None:
        axes.axhline(scale * base.value, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_title(f"{name}, %" if scale > 1 else name, loc="left", fontsize=9)
    axes.margins(y=0.12)
    axes.grid(axis="y")


def _points(protocol: ProtocolRecord, name: str) -> dict[float, Measure]:
    """The figure by the swept value, ascending; those that could be computed."""
    swept = {} if protocol.sweep is None else protocol.sweep.values
    found = {
        value: measure for one, value in swept.items() if (measure := known_measure(protocol, one, name)) is not None
    }
    return dict(sorted(found.items()))
