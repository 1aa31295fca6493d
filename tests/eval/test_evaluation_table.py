"""The wording of figures, the text table, and the order of checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from excise.errors import UsageError
from excise.eval.evaluation import Evaluation, Measure
from excise.eval.evaluation_checks import Status, headline, in_order, outcome, requirement
from excise.eval.evaluation_figures import (
    cell_text,
    difference_text,
    measure_names,
    one_line,
    power_sentences,
    problems,
    value_text,
)
from excise.eval.evaluation_table import table
from tests.eval.evaluations import MadeCheck, checks, make_evaluation


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return make_evaluation(tmp_path_factory.mktemp("images"), cases=12)


def figure(
    value: float | None, low: float | None = None, high: float | None = None, unit: str = "", error: str | None = None
) -> Measure:
    return Measure(value=value, low=low, high=high, n=9, unit=unit, error=error)


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (figure(66, 51, 84, "count"), "66 [51, 84]"),
        (figure(12345678, unit="count"), "12345678"),
        (figure(66.5, 51.2, 84.1, "count"), "66 [51, 84]"),
        (figure(0.0637, 0.0571, 0.0712, "fraction"), "6.4 % [5.7, 7.1]"),
        (figure(0.5, 0.3, 0.7, "fraction"), "50 % [30, 70]"),
        (figure(30.954, 30.81, 31.09), "30.95 [30.81, 31.09]"),
        (figure(-0.123, -0.5, 0.25), "-0.12 [-0.50, 0.25]"),
        (figure(31.2345, unit="dB"), "31.23 dB"),
        (figure(3.9e-9), "3.9e-09"),
        (figure(123456.7), "123457"),
        (figure(2.0, 2.0, 2.0), "2 [2, 2]"),
        (figure(2.0, 1.0, None), "2 [1, …]"),
        (figure(0.0, 0.0, 1e-9), "0.000000 [0.000000, 0.000000]"),
        (figure(None, error="no weights"), "not computed"),
        (None, ""),
    ],
)
def test_figures_in_words(measure: Measure | None, text: str) -> None:
    assert cell_text(measure) == text


def test_differences_have_a_sign() -> None:
    assert difference_text(18, figure(66, 51, 84, "count")) == "+18"
    assert difference_text(-0.02, figure(0.06, 0.01, 0.2, "fraction")) == "-2 points"
    assert difference_text(0.5, figure(30.95, 30.8, 31.1, "dB")) == "+0.50 dB"


def test_counts_come_first_whatever_the_order() -> None:
    measures = {"clip_score": figure(1), "fid": figure(2), "share": figure(0.1, unit="fraction")}
    turned = dict(reversed(measures.items()))
    assert measure_names([measures]) == measure_names([turned]) == ["share", "clip_score", "fid"]
    assert measure_names([measures, {"parts": figure(3, unit="count")}]) == ["parts", "share", "clip_score", "fid"]


def test_what_would_steer_a_terminal_is_left_out() -> None:
    assert one_line("a\x1b[31m red\r\n  thing\x00\u202e") == "a [31m red thing"


def test_table_keeps_to_the_width(evaluation: Evaluation) -> None:
    text = table(evaluation, checks(evaluation))
    assert max(map(len, text.splitlines())) <= 100
    assert max(map(len, table(evaluation).splitlines())) <= 100
    narrow = table(evaluation, width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    # Nothing is lost by the blocks.
    for runtime in evaluation.protocols[0].runtimes:
        for name, measure in runtime.measures.items():
            if name.count(".") < 2:
                assert value_text(measure) in narrow


def test_table_says_everything(evaluation: Evaluation) -> None:
    text = table(evaluation, checks(evaluation))
    lines = text.splitlines()
    assert any(line.split()[:4] == ["base", "(base)", "edited", "(reference)"] for line in lines)
    measure = evaluation.protocols[0].runtimes[0].measures["parts.RECE"]
    row = next(line for line in lines if line.startswith("parts.RECE "))
    assert row.split("parts.RECE")[1].strip().startswith(cell_text(measure))
    assert "Published, another model: parts.RECE: SD v1.4 646, UCE 186, RECE 66 (RECE, Table 1)" in text
    assert "an increase of parts.RECE by 9 or more would be caught with 95 % probability" in text
    assert "Not computed: lpips.64 in onnx-fp16: the AlexNet weights" in text
    assert "NOT INTACT: onnx-fp16" in text
    assert "parts.RECE.ROUND" not in text
    assert lines[-1] == "Failed: 1 of 4 checks failed, 1 skipped"
    states = [line.split()[0] for line in lines if line.startswith(("pass  ", "FAIL  ", "skip  "))]
    assert states == ["FAIL", "skip", "pass", "pass"]
    assert "checks" not in table(evaluation)


def test_power_that_could_not_be_computed_is_said(evaluation: Evaluation) -> None:
    protocol = evaluation.protocols[0].model_copy(update={"power": {"parts.RECE": figure(None, error="no base rate")}})
    assert power_sentences(protocol) == ["The power for parts.RECE could not be computed: no base rate."]
    assert problems(protocol) == problems(evaluation.protocols[0])


@pytest.mark.parametrize(
    ("statuses", "expected", "words"),
    [
        (["passed", "passed"], "passed", "Passed: 2 of 2 checks passed"),
        (["passed", "skipped"], "passed", "Passed: 1 of 2 checks passed, 1 skipped"),
        (["passed", "failed"], "failed", "Failed: 1 of 2 checks failed"),
        (["skipped", "skipped"], "skipped", "Not decided: all 2 checks were skipped"),
        ([], "skipped", "Not decided: there are no checks"),
    ],
)
def test_nothing_passes_that_was_not_checked(statuses: list[Status], expected: str, words: str) -> None:
    made = [MadeCheck(str(n), status, "") for n, status in enumerate(statuses)]
    assert outcome(made) == expected
    assert headline(made) == words


def test_failures_come_first_and_other_words_are_refused() -> None:
    given: list[Status] = ["passed", "failed", "skipped", "failed"]
    made = [MadeCheck(name, status, "") for name, status in zip("abcd", given, strict=True)]
    assert [check.name for check in in_order(made)] == ["b", "d", "c", "a"]
    with pytest.raises(UsageError, match="check 'x' is 'PASSED'"):
        in_order([MadeCheck("x", cast(Status, "PASSED"), "")])


def test_what_a_check_measured() -> None:
    def words(measured: object, bound: object) -> str:
        return requirement(MadeCheck("x", "passed", "", measured, bound))

    assert words(3.0, "2 × edited") == "measured 3, bound 2 × edited"
    assert words(figure(66, 51, 84, "count"), 0.123456789) == "measured 66 [51, 84], bound 0.123457"
    assert words(None, "every file\nas it says") == "bound every file as it says"
    assert words(None, None) == ""


def test_importing_is_light() -> None:
    modules = ("checks", "comparison", "figures", "page", "plots", "report", "svg", "table")
    names = ", ".join(f"excise.eval.evaluation_{name}" for name in modules)
    code = f"import sys, {names}; sys.exit(bool({{'torch', 'matplotlib', 'jinja2'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0
