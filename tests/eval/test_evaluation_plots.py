"""The plots: what they draw is what was measured, in the page's colours, named for those who can't see them."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from excise.eval.evaluation import CaseRecord, Comparison, Finding, Measure, ProtocolRecord, RuntimeRecord
from excise.eval.evaluation_figures import cell_text
from excise.eval.evaluation_plots import (
    difference_plots,
    differences,
    interval_plots,
    plots,
    series,
    trade_off_plots,
)
from excise.eval.evaluation_svg import Plot
from tests.eval.evaluations import BASE, CLASSES, FP16, HOSTILE, ONNX, REFERENCE, make_evaluation


@pytest.fixture(scope="module")
def protocols(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProtocolRecord, ...]:
    return make_evaluation(tmp_path_factory.mktemp("images"), cases=12).protocols


@pytest.fixture(scope="module")
def drawn(protocols: tuple[ProtocolRecord, ...]) -> dict[str, Plot]:
    return {plot.title: plot for n, one in enumerate(protocols) for plot in plots(one, f"p{n}")}


def elements(plot: Plot) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(plot.svg.replace("xlink:href", "href")).iter())


def texts(plot: Plot) -> list[str]:
    return [element.text for element in elements(plot) if element.tag == "text" and element.text]


def xs(path: ElementTree.Element) -> list[float]:
    """The horizontal places of a path's corners."""
    return [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d") or "")]


def small(values: dict[str, list[float | None]], names: tuple[str, ...] = ("a", "b")) -> ProtocolRecord:
    """Runtimes whose images have ``figure`` as given; None where an image has none."""
    cases = [
        CaseRecord(
            id=str(n),
            prompt="a thing",
            seed=n,
            group="kept",
            findings={
                name: Finding(file="x.png", sha256="", figures={} if value is None else {"figure": value})
                for name, value in zip(values, row, strict=True)
            },
        )
        for n, row in enumerate(zip(*values.values(), strict=True))
    ]
    return ProtocolRecord(
        name="small",
        version=1,
        title="Small",
        settings={},
        reference=names[0],
        runtimes=tuple(RuntimeRecord(name=name, source="", kind="onnx") for name in names),
        cases=tuple(cases),
    )


def test_every_kind_is_drawn(drawn: dict[str, Plot]) -> None:
    assert list(drawn) == [
        "Shares",
        "Counts",
        "parts.RECE by class",
        "relative_to_edit, image by image",
        "clip_score, image by image",
        "clip_score.kept against fid.kept",
    ]


def test_descriptions_hold_the_figures(drawn: dict[str, Plot], protocols: tuple[ProtocolRecord, ...]) -> None:
    for runtime in protocols[0].runtimes:
        for name, measure in runtime.measures.items():
            if measure.unit == "count":
                title = "parts.RECE by class" if name.count(".") == 2 else "Counts"
                assert (
                    f"{runtime.name} {cell_text(measure)}"
                    in drawn[title].description.partition(name)[2].partition(";")[0]
                )
    assert f"onnx: fid.kept {cell_text(protocols[1].runtimes[2].measures['fid.kept'])}" in (
        drawn["clip_score.kept against fid.kept"].description
    )


def test_points_and_bars_lie_where_the_figures_are(drawn: dict[str, Plot]) -> None:
    """The marks of a plot of known figures, read back from the drawing's own axis."""
    measures = {"parts": Measure(value=20, low=10, high=40, n=50, unit="count")}
    protocol = ProtocolRecord(
        name="one",
        version=1,
        title="",
        settings={},
        runtimes=(RuntimeRecord(name="a", source="", kind="onnx", measures=measures),),
    )
    (plot,) = interval_plots(protocol, "k")
    root = ElementTree.fromstring(plot.svg.replace("xlink:href", "href"))
    groups = {group.get("id") or "": group for group in root.iter("g")}
    ticks = {
        float(next(group.iter("text")).text or "nan"): xs(next(group.iter("path")))[0]
        for name, group in groups.items()
        if name.startswith("k-i0-xtick")
    }
    assert len(ticks) > 2
    scale = np.polyfit(list(ticks), list(ticks.values()), 1)
    inside = [path for path in root.iter("path") if path.get("clip-path")]
    (bar,) = [path for path in inside if "--series-2" in (path.get("style") or "")]
    # matplotlib writes six decimals of a point.
    assert xs(bar) == pytest.approx(np.polyval(scale, [10, 40]), abs=1e-4)
    point = next(use for use in root.iter("use") if "--series-2" in (use.get("style") or ""))
    assert float(point.get("x") or "nan") == pytest.approx(np.polyval(scale, 20), abs=1e-4)


def test_drawings_are_the_same_twice_and_keep_their_ids_apart(
    drawn: dict[str, Plot], protocols: tuple[ProtocolRecord, ...]
) -> None:
    again = interval_plots(protocols[0], "p0")
    assert [plot.svg for plot in again] == [drawn[plot.title].svg for plot in again]
    ids = [element.get("id") for plot in drawn.values() for element in elements(plot) if element.get("id")]
    assert len(ids) == len(set(ids))
    for plot in drawn.values():
        own = {element.get("id") for element in elements(plot)}
        referred = re.findall(r'(?:url\(#|href="#)([^)"]+)', plot.svg)
        assert referred
        assert set(referred) <= own


def test_drawings_are_named_and_in_the_pages_colours(drawn: dict[str, Plot]) -> None:
    for title, plot in drawn.items():
        root = ElementTree.fromstring(plot.svg.replace("xlink:href", "href"))
        assert root.get("role") == "img"
        names = [
            next(e for e in root.iter() if e.get("id") == name) for name in (root.get("aria-labelledby") or "").split()
        ]
        assert [name.tag for name in names] == ["title", "desc"]
        assert names[0].text == title
        assert names[1].text
        assert names[1].text.rstrip(".") in plot.description
        assert not re.search(r"(?:fill|stroke): (?!none|var\()", plot.svg)
        assert not re.search(r"http|<style|<script|<image|DejaVu|\d{4}-\d\d-\d\d", plot.svg)
        assert root.get("width") is root.get("height") is None


def test_a_hostile_name_is_text() -> None:
    measures = {"parts": Measure(value=2, low=1, high=3, n=5, unit="count")}
    protocol = ProtocolRecord(
        name="x",
        version=1,
        title="",
        settings={},
        runtimes=(RuntimeRecord(name=HOSTILE, source="", kind="onnx", measures=measures),),
    )
    (plot,) = interval_plots(protocol, "k")
    assert "<script" not in plot.svg
    assert HOSTILE in texts(plot)
    assert HOSTILE in plot.description


def test_what_could_not_be_computed_is_not_drawn() -> None:
    measures = {"parts": Measure(value=None, n=0, unit="count", error="no weights")}
    protocol = small({"a": [1.0], "b": [1.0]})
    runtimes = tuple(one.model_copy(update={"measures": measures}) for one in protocol.runtimes)
    assert interval_plots(protocol.model_copy(update={"runtimes": runtimes}), "k") == []
    some = (runtimes[0].model_copy(update={"measures": {"parts": Measure(value=4, n=5, unit="count")}}), runtimes[1])
    (plot,) = interval_plots(protocol.model_copy(update={"runtimes": some}), "k")
    assert "a 4" in plot.description
    assert "b" not in texts(plot)


def test_differences_are_paired_by_case() -> None:
    protocol = small({"a": [1.0, 5.0, None, 2.0], "b": [1.5, 4.0, 7.0, None]})
    assert differences(protocol, "a", "b", "figure").tolist() == [0.5, -1.0]
    assert differences(protocol, "b", "a", "figure").tolist() == [-0.5, 1.0]
    # What only the second has compares two images by itself.
    assert differences(small({"a": [None, None], "b": [0.1, 0.2]}), "a", "b", "figure").tolist() == [0.1, 0.2]
    assert differences(protocol, "a", "none", "figure").tolist() == []


def test_histograms_without_comparisons_are_of_the_reference() -> None:
    values: dict[str, list[float | None]] = {"a": [1.0, 5.0, 2.0], "b": [1.5, 4.0, 2.0]}
    (plot,) = difference_plots(small(values), "k")
    assert "b against a: 3 images, median 0, from -1 to 0.5" in plot.description
    compared = small(values).model_copy(update={"comparisons": (Comparison(first="b", second="a"),)})
    (plot,) = difference_plots(compared, "k")
    assert "a against b: 3 images, median 0, from -0.5 to 1" in plot.description
    # One image has no distribution.
    assert difference_plots(small({"a": [1.0], "b": [2.0]}), "k") == []


def test_equal_figures_are_drawn() -> None:
    (plot,) = difference_plots(small({"a": [1.0, 1.0], "b": [1.0, 1.0]}), "k")
    assert "median 0, from 0 to 0" in plot.description


def test_trade_off_needs_both(drawn: dict[str, Plot], protocols: tuple[ProtocolRecord, ...]) -> None:
    assert trade_off_plots(protocols[0], "k") == []
    shown = texts(drawn["clip_score.kept against fid.kept"])
    # The base has no FID to itself, and SD v1.4 no published one here.
    assert {REFERENCE, ONNX, FP16, "RECE, published"} <= set(shown)
    assert BASE not in shown
    assert "SD v1.4, published" not in shown


def test_the_base_and_the_reference_look_the_same_everywhere(protocols: tuple[ProtocolRecord, ...]) -> None:
    looks = [{one.name: (one.color, one.marker) for one in series(protocol)} for protocol in protocols]
    assert looks[0][BASE] == looks[1][BASE]
    assert looks[0][REFERENCE] == looks[1][REFERENCE]
    many = small({f"r{n}": [1.0] for n in range(32)}, tuple(f"r{n}" for n in range(32)))
    assert len({(one.color, one.marker) for one in series(many)}) == 32


def test_classes_are_shown_by_their_own_names(drawn: dict[str, Plot]) -> None:
    assert set(CLASSES) <= set(texts(drawn["parts.RECE by class"]))


def test_matplotlib_missing(protocols: tuple[ProtocolRecord, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from excise.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'excise\[eval\]'"):
        plots(protocols[0], "k")
