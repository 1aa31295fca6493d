"""An ablation's plot: every value of every figure that it shows is where it was measured."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from excise.eval.evaluation import Measure, ProtocolRecord, RuntimeRecord, SweepRecord
from excise.eval.evaluation_plots import plots
from excise.eval.evaluation_sweep import sweep_figures, sweep_plots

VALUES = {"ridge-0.001": 0.001, "ridge-0.1": 0.1, "ridge-10": 10.0}


def record(sweep: bool = True, **shares: float) -> ProtocolRecord:
    """Three swept runtimes and the base, with the share that is detected by runtime."""
    shares = {"base": 0.9, "ridge-0.001": 0.5, "ridge-0.1": 0.25, "ridge-10": 0.75} | shares
    return ProtocolRecord(
        name="things",
        version=1,
        title="Things",
        settings={},
        base="base",
        runtimes=tuple(
            RuntimeRecord(
                name=name,
                source="torch:x",
                kind="torch",
                measures={
                    "detected.top1": Measure(value=share, low=share - 0.1, high=share + 0.1, n=9, unit="fraction"),
                    "detected.top1.GUN": Measure(value=share, n=9, unit="fraction"),
                    "clip_score.erased": Measure(value=20.0, n=9),
                    "clip_score.kept": Measure(value=30.0, n=9),
                    "fid.kept": Measure(value=None, n=9, error="no base") if name == "base" else Measure(value=1, n=9),
                    "psnr.kept": Measure(value=20.0, n=9, unit="dB"),
                },
            )
            for name, share in shares.items()
        ),
        sweep=SweepRecord(preset="weapons", parameter="ridge", values=VALUES) if sweep else None,
    )


def test_the_figures_are_what_is_erased_and_what_is_kept() -> None:
    assert sweep_figures(record()) == ("detected.top1", "clip_score.kept", "fid.kept", "psnr.kept")
    assert sweep_figures(record(sweep=False)) == ()


def test_the_points_are_in_order_and_as_high_as_measured() -> None:
    (plot,) = sweep_plots(record(), "p0-s")
    title, description, svg = plot.title, plot.description, plot.svg
    assert title == "Over λ of RECE's eq. 8"
    for part in ("50 % [40, 60] at 0.001", "25 % [15, 35] at 0.1", "75 % [65, 85] at 10", "90 % [80, 100] unedited"):
        assert part in description, description
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    line = next(e for e in root.iter("path") if "--series-2" in e.get("style", "") and len(_corners(e)) == 3)
    (x0, y0), (x1, y1), (x2, y2) = _corners(line)
    # a logarithmic axis: the two steps of a factor of 100 are equally wide; y grows downwards
    assert x1 - x0 == pytest.approx(x2 - x1, rel=1e-3)
    assert (y1 - y0) / (y0 - y2) == pytest.approx(1.0, rel=1e-3)
    assert y1 > y0 > y2


def test_a_page_has_it_first_and_only_where_there_is_a_sweep() -> None:
    assert plots(record(), "p0")[0].title == "Over λ of RECE's eq. 8"
    assert all("eq. 8" not in plot.title for plot in plots(record(sweep=False), "p0"))


def _corners(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d") or "")]
