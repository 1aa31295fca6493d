"""The files of an evaluation: the same bytes for the same figures, read back equal, nothing of the user's replaced."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

from excise.errors import OutputError, UsageError
from excise.eval.evaluation import Evaluation, read_evaluation
from excise.eval.evaluation_report import as_json, write_evaluation
from tests.eval.evaluations import checks, make_evaluation


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return make_evaluation(tmp_path_factory.mktemp("images"), cases=8)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a page's time is its plots', which have tests of their own."""
    monkeypatch.setattr("excise.eval.evaluation_page.plots", lambda protocol, key: ())


def other_order(value: object) -> object:
    """The same document with every object's keys the other way round."""
    if isinstance(value, dict):
        return {name: other_order(value[name]) for name in reversed(value)}
    return [other_order(one) for one in value] if isinstance(value, list) else value


def test_reads_back_equal(tmp_path: Path, evaluation: Evaluation) -> None:
    paths = write_evaluation(tmp_path, evaluation)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert read_evaluation(paths["report.json"]) == evaluation
    assert json.loads(paths["report.json"].read_text()) == evaluation.model_dump(mode="json")


def test_equal_evaluations_are_equal_files(tmp_path: Path, evaluation: Evaluation) -> None:
    turned = Evaluation.model_validate(other_order(evaluation.model_dump(mode="json")))
    assert list(turned.versions) != list(evaluation.versions)
    assert as_json(turned) == as_json(evaluation)
    first = {name: path.read_bytes() for name, path in write_evaluation(tmp_path, evaluation).items()}
    again = {name: path.read_bytes() for name, path in write_evaluation(tmp_path, turned).items()}
    assert first == again


def test_another_figure_is_another_file(tmp_path: Path, evaluation: Evaluation) -> None:
    other = evaluation.model_copy(update={"machine": "another"})
    assert as_json(other) != as_json(evaluation)
    write_evaluation(tmp_path, evaluation)
    with pytest.raises(OutputError, match="another evaluation"):
        write_evaluation(tmp_path, other)
    assert read_evaluation(tmp_path) == evaluation
    write_evaluation(tmp_path, other, replace=True)
    assert read_evaluation(tmp_path) == other


def test_a_verdict_is_added_later(tmp_path: Path, evaluation: Evaluation) -> None:
    page = write_evaluation(tmp_path, evaluation)["report.html"]
    assert "No verdict" in page.read_text()
    before = (tmp_path / "report.json").read_bytes()
    write_evaluation(tmp_path, evaluation, checks(evaluation))
    assert "Failed: 1 of 4 checks failed, 1 skipped" in page.read_text()
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_page_of_the_users_stays(tmp_path: Path, evaluation: Evaluation) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(OutputError, match="no page of excise's"):
        write_evaluation(tmp_path, evaluation, replace=True)
    assert (tmp_path / "report.html").read_text() == "mine"
    assert not (tmp_path / "report.json").exists()


def test_a_missing_folder(tmp_path: Path, evaluation: Evaluation) -> None:
    with pytest.raises(OutputError, match="is not a folder"):
        write_evaluation(tmp_path / "none", evaluation)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_a_setting_that_json_has_no_word_for(tmp_path: Path, evaluation: Evaluation, value: object) -> None:
    protocol = evaluation.protocols[0].model_copy(update={"settings": {"steps": value}})
    with pytest.raises(UsageError, match="can't be written as JSON"):
        write_evaluation(tmp_path, evaluation.model_copy(update={"protocols": (protocol,)}))
    assert not list(tmp_path.glob("report.*"))


def test_a_full_disk_leaves_the_old_files(
    tmp_path: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_evaluation(tmp_path, evaluation)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("report.*")}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_evaluation(tmp_path, evaluation, checks(evaluation))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("report.*")} == before
    assert [path.name for path in tmp_path.glob(".*")] == []


def schema() -> ModuleType:
    path = Path(__file__).parent.parent.parent / "docs" / "write_schema.py"
    spec = importlib.util.spec_from_file_location("write_schema", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_is_current_and_complete() -> None:
    module = schema()
    text = module.PAGE.read_text()
    assert text == module.page(), "run make docs"
    definitions = Evaluation.model_json_schema()["$defs"]
    assert set(definitions) <= {model.__name__ for model in module.MODELS}
    for name, definition in definitions.items():
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for field in definition["properties"]:
            assert f"| `{field}` |" in section


def test_the_schema_reads_comments_behind_and_above() -> None:
    meanings = schema().meanings
    from excise.eval.evaluation import Measure, ProtocolRecord

    assert meanings(Measure)["unit"] == "``count``, ``fraction``, ``dB``, …"
    assert meanings(ProtocolRecord)["power"].startswith("Of each count: the smallest increase")
    assert "name" not in meanings(ProtocolRecord)
