"""The plots of an evaluation's page.

Runtimes differ by their marker as well as by their colour, and every plot has a description with all its figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from excise.eval.evaluation import Measure, ProtocolRecord
from excise.eval.evaluation_figures import cell_text, is_class, known_measure, measure_names, roles
from excise.eval.evaluation_svg import INK, RULE, SERIES, Plot, drawn
from excise.eval.evaluation_sweep import sweep_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS: Final = "os^DvPX"
#: Heights in inches: of a runtime in a row of intervals, of a histogram.
_ROW, _PANEL = 0.17, 1.05
_MOST_HISTOGRAMS, _MOST_BINS, _LEGEND = 6, 40, 68


@dataclass(frozen=True)
class Series:
    """How a runtime is drawn in all plots of a protocol."""

    name: str
    color: str
    marker: str


def plots(protocol: ProtocolRecord, key: str) -> tuple[Plot, ...]:
    """All plots that the protocol's figures allow.

    Args:
        key: tells this protocol's drawings from others on the same page; letters, digits and ``-``.

    Raises:
        MissingExtra: matplotlib isn't installed.
    """
    made = [
        *sweep_plots(protocol, f"{key}-s"),
        *interval_plots(protocol, key),
        *difference_plots(protocol, key),
        *trade_off_plots(protocol, key),
    ]
    return tuple(made)


def series(protocol: ProtocolRecord) -> tuple[Series, ...]:
    """A colour and a marker for each runtime; the base and the reference have theirs in every protocol."""
    role, made, others = roles(protocol), [], 2
    for runtime in protocol.runtimes:
        if role[runtime.name] == "judged":
            number, others = others, others + 1
        else:
            number = ("base", "reference").index(role[runtime.name])
        # Five colours and seven markers have no common divisor: 35 runtimes before two look the same.
        color = number if number < 2 else 2 + (number - 2) % (len(SERIES) - 2)
        made.append(Series(runtime.name, SERIES[color], _MARKERS[number % len(_MARKERS)]))
    return tuple(made)


def interval_plots(protocol: ProtocolRecord, key: str) -> list[Plot]:
    """Counts, shares and the classes of each count: a point and its interval a runtime."""
    names = measure_names(runtime.measures for runtime in protocol.runtimes)
    families: dict[str, list[str]] = {}
    for name in names:
        units = {runtime.measures[name].unit for runtime in protocol.runtimes if name in runtime.measures}
        if is_class(name):
            families.setdefault(f"{name.rpartition('.')[0]} by class", []).append(name)
        elif units == {"count"}:
            families.setdefault("Counts", []).append(name)
        elif units == {"fraction"}:
            families.setdefault("Shares", []).append(name)
    made = [_interval_plot(title, rows, protocol, f"{key}-i{n}") for n, (title, rows) in enumerate(families.items())]
    return [plot for plot in made if plot is not None]


def _interval_plot(title: str, names: Sequence[str], protocol: ProtocolRecord, key: str) -> Plot | None:
    rows = {
        name: [
            (one, measure)
            for one in series(protocol)
            if (measure := known_measure(protocol, one.name, name)) is not None
        ]
        for name in names
    }
    rows = {name: found for name, found in rows.items() if found}
    if not rows:
        return None
    shares = any(measure.unit == "fraction" for found in rows.values() for _, measure in found)
    count = len(protocol.runtimes)

    def draw(axes: Axes) -> None:
        order = {one.name: place for place, one in enumerate(series(protocol))}
        for row, found in enumerate(rows.values()):
            for one, measure in found:
                y = row + ((order[one.name] + 0.5) / count - 0.5) * 0.76
                _bar(axes, one, measure, y, 100.0 if shares else 1.0)
        axes.set_yticks(range(len(rows)), [name.rpartition(".")[2] if is_class(name) else name for name in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=8, integer=True)
        for line in range(1, len(rows)):
            axes.axhline(line - 0.5, color=RULE, linewidth=0.8)
        axes.set_xlabel("% of images, 0 at the left" if shares else "count, 0 at the left")
        axes.grid(axis="x")
        _legend(axes, [one for one in series(protocol) if any(one == other for f in rows.values() for other, _ in f)])

    height = 0.75 + _ROW * count * len(rows) + 0.1 * len(rows)
    words = "; ".join(
        f"{name}: " + ", ".join(f"{one.name} {cell_text(measure)}" for one, measure in found)
        for name, found in rows.items()
    )
    return Plot(
        title, f"Points with their intervals. {words}.", drawn(1, height, lambda a: draw(a[0]), title, words, key)
    )


def difference_plots(protocol: ProtocolRecord, key: str) -> list[Plot]:
    """How each image's figures differ between two runtimes: one histogram a comparison, on one axis."""
    pairs = [(one.first, one.second) for one in protocol.comparisons]
    if not pairs and protocol.reference is not None:
        pairs = [(protocol.reference, name) for name, role in roles(protocol).items() if role == "judged"]
    names = {name for case in protocol.cases for finding in case.findings.values() for name in finding.figures}
    made: list[Plot] = []
    # What the edit is the measure of comes first.
    for name in sorted(names, key=lambda name: (name != "relative_to_edit", name)):
        found = {pair: values for pair in pairs if len(values := differences(protocol, *pair, name)) > 1}
        if found and len(made) < _MOST_HISTOGRAMS:
            made.append(_difference_plot(name, found, protocol, f"{key}-d{len(made)}"))
    return made


def differences(protocol: ProtocolRecord, first: str, second: str, name: str) -> npt.NDArray[np.float64]:
    """Of each case, ``second``'s figure minus ``first``'s; where only ``second`` has it, it compares two images itself.

    Returns:
        float64 (cases that have the figure,).
    """
    found = [(case.findings.get(first), case.findings.get(second)) for case in protocol.cases]
    values = [(a.figures.get(name) if a else None, b.figures[name]) for a, b in found if b and name in b.figures]
    if any(a is not None for a, _ in values):
        return np.array([b - a for a, b in values if a is not None], np.float64)
    return np.array([b for _, b in values], np.float64)


def _difference_plot(
    name: str, found: Mapping[tuple[str, str], npt.NDArray[np.float64]], protocol: ProtocolRecord, key: str
) -> Plot:
    every = np.concatenate(list(found.values()))
    edges = np.histogram_bin_edges(every, bins=min(_MOST_BINS, max(10, round(2 * len(every) ** (1 / 3)))))
    look = {one.name: one for one in series(protocol)}

    def draw(panels: Sequence[Axes]) -> None:
        for axes, ((first, second), values) in zip(panels, found.items(), strict=True):
            axes.hist(
                values, edges.tolist(), histtype="stepfilled", color=look[second].color if second in look else INK
            )
            axes.axvline(float(np.median(values)), color=INK, linewidth=1, linestyle=(0, (3, 2)))
            if edges[0] < 0 < edges[-1]:
                axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_title(f"{second} against {first}: median {np.median(values):.3g}", loc="left", fontsize=9)
            axes.set_ylabel("images")
            axes.locator_params(axis="y", nbins=3, integer=True)
            axes.grid(axis="y")
        panels[-1].set_xlabel(name)

    words = "; ".join(
        f"{second} against {first}: {len(values)} images, median {np.median(values):.3g}, from {values.min():.3g} to "
        f"{values.max():.3g}"
        for (first, second), values in found.items()
    )
    title = f"{name}, image by image"
    description = f"Histograms; the dashed line is the median. {words}."
    return Plot(title, description, drawn(len(found), 0.45 + _PANEL * len(found), draw, title, description, key))


def trade_off_plots(protocol: ProtocolRecord, key: str) -> list[Plot]:
    """CLIP score against FID, where a runtime has both; published figures of the same measures are hollow."""
    names = measure_names(runtime.measures for runtime in protocol.runtimes)
    made: list[Plot] = []
    for fid in (name for name in names if name.partition(".")[0] == "fid" and not is_class(name)):
        wanted = (f"clip_score.{fid.partition('.')[2]}", "clip_score.kept", "clip_score")
        clip = next((name for name in wanted if name in names), None)
        if clip is not None and any(_both(protocol, one.name, fid, clip) for one in series(protocol)):
            made.append(_trade_off_plot(fid, clip, protocol, f"{key}-t{len(made)}"))
    return made


def _trade_off_plot(fid: str, clip: str, protocol: ProtocolRecord, key: str) -> Plot:
    points = {one: both for one in series(protocol) if (both := _both(protocol, one.name, fid, clip)) is not None}
    published: dict[str, dict[str, float]] = {}
    for figure in protocol.paper:
        if figure.measure in (fid, clip):
            published.setdefault(figure.method, {})[figure.measure] = figure.value
    published = {method: values for method, values in published.items() if len(values) == 2}

    def draw(axes: Axes) -> None:
        for one, (x, y) in points.items():
            axes.errorbar(
                [x.value or 0.0],
                [y.value or 0.0],
                xerr=_arms(x),
                yerr=_arms(y),
                fmt=one.marker,
                color=one.color,
                markersize=6,
                elinewidth=1.4,
                label=one.name,
            )
        for number, (method, values) in enumerate(published.items()):
            axes.plot(
                [values[fid]],
                [values[clip]],
                _MARKERS[-1 - number % len(_MARKERS)],
                color=INK,
                fillstyle="none",
                markersize=7,
                label=f"{method}, published",
            )
        axes.set_xlabel(f"{fid}, lower is better")
        axes.set_ylabel(f"{clip}, higher is better")
        axes.margins(0.15)
        axes.grid()
        axes.legend(
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(0, -0.2),
            ncols=_columns([*(one.name for one in points), *(f"{method}, published" for method in published)]),
            borderaxespad=0,
        )

    words = "; ".join(f"{one.name}: {fid} {cell_text(x)}, {clip} {cell_text(y)}" for one, (x, y) in points.items())
    words += "".join(f"; {name}, published: {fid} {v[fid]:g}, {clip} {v[clip]:g}" for name, v in published.items())
    title = f"{clip} against {fid}"
    return Plot(title, f"Better is up and left. {words}.", drawn(1, 3.4, lambda a: draw(a[0]), title, words, key))


def _both(protocol: ProtocolRecord, runtime: str, fid: str, clip: str) -> tuple[Measure, Measure] | None:
    x, y = known_measure(protocol, runtime, fid), known_measure(protocol, runtime, clip)
    return (x, y) if x is not None and y is not None else None


def _bar(axes: Axes, one: Series, measure: Measure, y: float, scale: float) -> None:
    value = scale * (measure.value or 0.0)
    if measure.low is not None and measure.high is not None:
        axes.plot([scale * measure.low, scale * measure.high], [y, y], color=one.color, linewidth=1.6)
    axes.plot([value], [y], one.marker, color=one.color, markersize=5, clip_on=False)


def _arms(measure: Measure) -> list[list[float]] | None:
    if measure.value is None or measure.low is None or measure.high is None:
        return None
    return [[max(0.0, measure.value - measure.low)], [max(0.0, measure.high - measure.value)]]


def _legend(axes: Axes, shown: Sequence[Series]) -> None:
    for one in shown:
        axes.plot([], [], one.marker, color=one.color, linestyle="-", linewidth=1.6, markersize=5, label=one.name)
    axes.figure.legend(loc="outside lower left", frameon=False, ncols=_columns([one.name for one in shown]))


def _columns(names: Sequence[str]) -> int:
    """How many names a legend takes in a line."""
    return max(1, min(4, _LEGEND // (max(map(len, names)) + 6)))
