"""Two evaluations side by side: nothing is compared that isn't the same figure, and nothing is left unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from excise.errors import ArtefactError
from excise.eval.evaluation import Comparison, Evaluation, Measure, ProtocolRecord, Provenance, RuntimeRecord
from excise.eval.evaluation_comparison import (
    ComparedMeasure,
    EvaluationComparison,
    compare,
    compare_reports,
    comparison_page,
    comparison_text,
)
from excise.eval.evaluation_report import as_json
from tests.eval.evaluations import ONNX, make_evaluation


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return make_evaluation(tmp_path_factory.mktemp("images"), cases=8)


def figure(
    value: float | None, low: float | None = None, high: float | None = None, better: str = "lower", unit: str = "count"
) -> Measure:
    return Measure.model_validate({"value": value, "low": low, "high": high, "n": 9, "unit": unit, "better": better})


def one(measure: Measure | None, **changes: object) -> Evaluation:
    """An evaluation of one figure, ``parts`` of the runtime ``a``."""
    runtime = RuntimeRecord(
        name="a", source="onnx:a", kind="onnx", measures={} if measure is None else {"parts": measure}
    )
    protocol = ProtocolRecord(name="p", version=1, title="P", settings={"steps": 50}, runtimes=(runtime,))
    return Evaluation(protocols=(protocol.model_copy(update=changes),))


def compared(a: Measure, b: Measure) -> ComparedMeasure:
    (row,) = compare(one(a), one(b)).rows
    return row


def test_an_evaluation_equals_itself(evaluation: Evaluation) -> None:
    same = compare(evaluation, evaluation)
    expected = sum(
        sum(len(one.measures) for one in protocol.runtimes) + sum(len(one.measures) for one in protocol.comparisons)
        for protocol in evaluation.protocols
    )
    assert len(same.rows) == expected
    assert same.only_a == same.only_b == same.circumstances == ()
    for row in same.rows:
        assert row.difference == (None if row.a.value is None else 0)
        assert row.overlap is (None if row.a.low is None else True)
        assert row.change == ("unknown" if row.a.value is None else "same")
    assert EvaluationComparison.model_validate_json(same.model_dump_json()) == same


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ((1, 3), (2, 4), True),
        ((1, 3), (3, 4), True),
        ((1, 3), (3.001, 4), False),
        ((2, 4), (1, 1.999), False),
        ((1, 9), (4, 5), True),
        ((None, None), (4, 5), None),
        ((1, None), (4, 5), None),
    ],
)
def test_overlap(
    a: tuple[float | None, float | None], b: tuple[float | None, float | None], overlap: bool | None
) -> None:
    assert compared(figure(2, *a), figure(4, *b)).overlap is overlap
    assert compared(figure(4, *b), figure(2, *a)).overlap is overlap


@pytest.mark.parametrize(
    ("a", "b", "change"),
    [
        (figure(9, 8, 10), figure(2, 1, 3), "better"),
        (figure(2, 1, 3), figure(9, 8, 10), "worse"),
        (figure(2, 1, 3, "higher"), figure(9, 8, 10, "higher"), "better"),
        (figure(2, 1, 3, "neither"), figure(9, 8, 10, "neither"), "unknown"),
        (figure(2, 1, 3, "lower"), figure(9, 8, 10, "higher"), "unknown"),
        # Overlapping intervals say nothing, however far the points are apart.
        (figure(2, 1, 9), figure(9, 8, 10), "unknown"),
        (figure(2), figure(9), "unknown"),
        (figure(2), figure(2), "same"),
        (figure(None), figure(2, 1, 3), "unknown"),
    ],
)
def test_a_change_is_named_only_where_intervals_are_apart(a: Measure, b: Measure, change: str) -> None:
    assert compared(a, b).change == change


def test_figures_of_different_units_are_not_subtracted() -> None:
    row = compared(figure(0.5, 0.4, 0.6, unit="fraction"), figure(50, 40, 60))
    assert (row.difference, row.overlap, row.change) == (None, None, "unknown")


def test_what_only_one_has_is_named(evaluation: Evaluation) -> None:
    first, second = evaluation.protocols
    fewer = first.runtimes[0].model_copy(
        update={"measures": {name: m for name, m in first.runtimes[0].measures.items() if name != "parts.SPEED"}}
    )
    other = evaluation.model_copy(
        update={
            "protocols": (
                first.model_copy(
                    update={
                        "runtimes": (fewer, *first.runtimes[1:3]),
                        "comparisons": (*first.comparisons[:1], Comparison(first="onnx", second="edited")),
                    }
                ),
                second.model_copy(update={"name": "others"}),
            )
        }
    )
    found = compare(evaluation, other)
    assert found.only_a == (
        "protocol captions",
        "shapes: onnx-fp16",
        "shapes: onnx-fp16 against edited",
        "shapes, base: parts.SPEED",
    )
    assert found.only_b == ("protocol others", "shapes: edited against onnx")
    turned = compare(other, evaluation)
    assert set(turned.only_a) == set(found.only_b)
    assert set(turned.only_b) == set(found.only_a)
    assert {row.protocol for row in found.rows} == {"shapes"}
    assert "Only in A: shapes: onnx-fp16\n" in comparison_text(found)
    assert "protocol others" in comparison_page(found)


def test_what_may_be_why_is_named(evaluation: Evaluation) -> None:
    first = evaluation.protocols[0]
    runtimes = tuple(
        runtime.model_copy(update={"provenance": Provenance(edit="another")}) if runtime.name == ONNX else runtime
        for runtime in first.runtimes
    )
    changed = first.model_copy(
        update={
            "version": 3,
            "settings": {**first.settings, "steps": 25},
            "runtimes": runtimes,
            "cases": first.cases[:-1],
            "reference": None,
        }
    )
    other = evaluation.model_copy(
        update={"machine": "8 cores", "versions": {"python": "3.12.1"}, "protocols": (changed, evaluation.protocols[1])}
    )
    found = "\n".join(compare(evaluation, other).circumstances)
    assert "machine: 2 cores, Linux and 8 cores" in found
    assert "version of python: 3.11.9 and 3.12.1" in found
    assert "version of nudenet: 3.4.2 and none" in found
    assert "shapes: version: 2 and 3" in found
    assert "shapes: setting steps: 50 and 25" in found
    assert "shapes: reference: edited and None" in found
    assert "of its cases, 1 are only in A and 0 only in B" in found
    assert "shapes, onnx: edit: " in found
    assert "and another" in found
    assert "captions" not in found
    assert "scheduler" not in found


def test_another_format_is_refused(tmp_path: Path, evaluation: Evaluation) -> None:
    (tmp_path / "a.json").write_bytes(as_json(evaluation))
    later = json.loads(as_json(evaluation)) | {"format": 2}
    (tmp_path / "b.json").write_text(json.dumps(later))
    assert compare_reports(tmp_path / "a.json", tmp_path / "a.json") == compare(evaluation, evaluation)
    for pair in (("a.json", "b.json"), ("b.json", "a.json")):
        with pytest.raises(ArtefactError, match=r"b\.json is no evaluation of format 1: format"):
            compare_reports(*(tmp_path / name for name in pair))
    with pytest.raises(ArtefactError, match="B is of format 2"):
        compare(evaluation, evaluation.model_copy(update={"format": 2}))


def test_text(tmp_path: Path, evaluation: Evaluation) -> None:
    other = make_evaluation(tmp_path, cases=8, seed=1)
    text = comparison_text(compare(evaluation, other), ("runs/monday", "runs/tuesday"))
    lines = text.splitlines()
    assert lines[:2] == ["A: runs/monday", "B: runs/tuesday"]
    assert max(map(len, lines)) <= 100
    apart = comparison_text(compare(one(figure(9, 8, 10)), one(figure(2, 1, 3))))
    assert apart.splitlines()[3:] == [
        "p                A         B  B − A  intervals",
        "a",
        "  parts  9 [8, 10]  2 [1, 3]     -7  apart: better",
    ]
    assert "They share no figure." in comparison_text(compare(one(figure(1)), one(None)))


def test_page_is_safe_and_says_the_same() -> None:
    found = compare(
        one(figure(9, 8, 10)), one(figure(2, 1, 3), name="p", settings={"steps": "<script>alert(1)</script>"})
    )
    source = comparison_page(found, ("<b>a</b>", "b"))
    assert "<script" not in source
    assert "<b>a" not in source
    assert "&lt;b&gt;a" in source
    assert "http://" not in source
    assert "https://" not in source
    assert "1 shared figures, intervals apart in 1" in source
    assert "apart: better" in source
    assert "-7" in source
    assert "They share no figure." in comparison_page(compare(one(figure(1)), one(None)))
