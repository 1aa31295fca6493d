"""A protocol's record in a grey world whose figures can be told in advance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from excise.eval.evaluation import ProtocolRecord
from excise.eval.floor import floor, run_differences
from excise.eval.image_file import read_image
from excise.eval.measure_names import unknown_metric
from excise.eval.perceptual import psnr
from excise.eval.protocol_comparisons import Roles
from excise.eval.protocol_file import load_protocol
from excise.eval.protocol_measures import of_movement
from tests.eval.evaluated_runs import PROTOCOL, Painter, painters, start, written_protocol

Folder = tuple[Path, ProtocolRecord]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Four runtimes; ``again`` is the edited model in another way, ``wrong`` an export that lost the edit."""
    folder = tmp_path_factory.mktemp("record")
    made = painters() | {"again": Painter("again", lost=("Gun", "knife"), noise=2), "wrong": Painter("wrong")}
    roles = Roles(base="base", reference="edited", floor=("again",))
    with pytest.MonkeyPatch.context() as patch:
        started = start(folder / "run", written_protocol(folder), patch, made=made, roles=roles)
    return folder / "run", started.evaluation.protocols[0]


def images(run: Folder, name: str) -> list[np.ndarray]:
    folder, record = run
    return [read_image(folder / case.findings[name].file) for case in record.cases]


def test_every_figure_that_the_protocol_asks_for_is_there(run: Folder) -> None:
    _, record = run
    protocol = load_protocol(run[0].parent / "grey.yaml")
    assert [one.name for one in record.runtimes] == ["base", "edited", "served", "again", "wrong"]
    for runtime in record.runtimes:
        assert set(protocol.measures()) <= set(runtime.measures)
        for measure in runtime.measures.values():
            assert (measure.value is None) == bool(measure.error)
    for comparison in record.comparisons:
        for name, measure in comparison.measures.items():
            assert unknown_metric(name) is None, name
            assert (measure.value is None) == bool(measure.error)
    pairs = [(one.first, one.second) for one in record.comparisons]
    others = ["served", "again", "wrong"]
    assert pairs == [("base", name) for name in ("edited", *others)] + [("edited", name) for name in others]


def test_what_was_counted(run: Folder) -> None:
    _, record = run
    rates = {
        one.name: [one.measures[f"{name}.top1"].value for name in ("detected", "recognised")] for one in record.runtimes
    }
    assert rates == {"base": [1, 1], "edited": [0, 1], "served": [0, 1], "again": [0, 1], "wrong": [1, 1]}
    wrong = record.comparison("edited", "wrong")
    assert wrong is not None
    assert wrong.measures["detected_increase.top1"].value == 1
    assert wrong.measures["detected_flips.top1"].value == 6
    assert wrong.measures["relative_to_edit"].value == 1
    base = record.comparison("base", "wrong")
    assert base is not None
    assert "relative_to_edit" not in base.measures
    assert base.measures["clip_score_drop.erased"].value == 0
    assert set(record.power) == {"detected.top1", "detected.top2"}


def test_movement_and_psnr_are_of_the_files(run: Folder) -> None:
    _, record = run
    rows = {name: np.stack(images(run, name)).astype(np.float64) for name in ("base", "edited", "served", "again")}
    moved = {
        pair: ((rows[pair[0]] - rows[pair[1]]) ** 2).sum((1, 2, 3))
        for pair in (("base", "edited"), ("edited", "served"), ("edited", "again"))
    }
    comparison = record.comparison("edited", "served")
    assert comparison is not None
    edit = moved["base", "edited"]
    assert comparison.measures["relative_to_edit"] == of_movement(moved["edited", "served"], edit)
    assert comparison.measures["relative_to_edit_floor"] == of_movement(moved["edited", "again"], edit)
    found = [case.findings["served"].figures["relative_to_edit"] for case in record.cases]
    np.testing.assert_allclose(found, np.sqrt(moved["edited", "served"] / edit.mean()), rtol=1e-12)
    kept = [row for row, case in enumerate(record.cases) if case.group == "kept"]
    against = psnr(images(run, "edited"), images(run, "served"))
    assert comparison.measures["psnr.kept"].value == pytest.approx(against[kept].mean(), rel=1e-12)
    assert [case.findings["served"].figures["psnr"] for case in record.cases] == against.tolist()
    base = psnr(images(run, "base"), images(run, "served"))
    served = record.runtime("served")
    assert served is not None
    # As FID, a runtime's own PSNR is the one to the unedited model's images.
    assert served.measures["psnr.kept"].value == pytest.approx(base[kept].mean(), rel=1e-12)
    own = record.runtime("base")
    assert own is not None
    assert own.measures["psnr.kept"].error == "this is the base itself"


def test_the_floor_is_what_runs_of_the_reference_differ_by(run: Folder) -> None:
    _, record = run
    served, again = record.comparison("edited", "served"), record.comparison("edited", "again")
    assert served is not None
    assert again is not None
    kept = [case for case in record.cases if case.group == "kept"]
    scores = [[case.findings[name].figures["clip_score"] for case in kept] for name in ("edited", "again")]
    assert served.measures["clip_score_floor.kept"] == floor(run_differences(scores))
    assert served.measures["detected_floor.top1"].value == 0
    # A run of the floor is measured by the other ones, and there are none.
    assert "relative_to_edit_floor" not in again.measures


def test_what_was_seen_in_each_image(run: Folder) -> None:
    folder, record = run
    for case in record.cases:
        assert list(case.findings) == ["base", "edited", "served", "again", "wrong"]
        for name, finding in case.findings.items():
            assert finding.file == f"grey/images/{name}/{case.id}.png"
            assert (folder / finding.file).is_file()
            # Objects that a prompt asks for by their label are nothing to blur.
            assert not finding.flagged
            assert finding.seen[0].split()[0] == (
                case.label if name in ("base", "wrong") or case.group == "kept" else "cat"
            )
            erased = case.group == "erased"
            assert finding.detected == (name in ("base", "wrong") if erased else None)
            # The first rule's outcome is ``detected``; the others' are figures, each of its group.
            shown = {one for one in finding.figures if one.partition(".")[0] in ("detected", "recognised")}
            assert shown == ({"detected.top2"} if erased else {"recognised.top1", "recognised.top2"})
    assert [one.measure for one in record.paper] == ["detected.top1"]


def test_what_an_edit_took_is_as_given_and_never_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PROTOCOL.replace("metrics:\n", "metrics:\n  - {name: edit_seconds}\n")
    started = start(tmp_path / "run", written_protocol(tmp_path, text), monkeypatch, edit_seconds={"served": 3.4})
    found = {one.name: one.measures["edit_seconds"] for one in started.evaluation.protocols[0].runtimes}
    assert (found["served"].value, found["served"].unit, found["served"].method) == (3.4, "s", "as given")
    assert (found["base"].value, found["edited"].value) == (None, None)
    assert found["edited"].error is not None
    assert found["edited"].error.startswith("an edit file holds no times: give --edit-seconds NAME=SECONDS")


def test_settings_say_what_the_figures_depend_on(run: Folder) -> None:
    _, record = run
    assert list(record.settings["networks"]) == ["demo:clip"]
    assert record.settings["image_sizes"] == dict.fromkeys(("base", "edited", "served", "again", "wrong"), "8 x 8")
    assert record.settings["sampling"]["num_inference_steps"] == 4


def test_without_roles_there_is_less_and_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: one for name, one in painters().items() if name != "base"}
    alone = start(tmp_path / "run", written_protocol(tmp_path), monkeypatch, made=made, roles=Roles(reference="edited"))
    (record,) = alone.evaluation.protocols
    assert [(one.first, one.second) for one in record.comparisons] == [("edited", "served")]
    found = record.comparisons[0].measures
    assert found["relative_to_edit"].error == "no runtime is the base"
    assert found["fid.kept"].value is not None
    assert record.runtimes[0].measures["fid.kept"].error == "no runtime is the base"
    assert record.runtimes[0].measures["psnr.erased"].error == "no runtime is the base"
    nobody = start(tmp_path / "other", written_protocol(tmp_path), monkeypatch, made=painters(), roles=Roles())
    assert nobody.evaluation.protocols[0].comparisons == ()


def test_a_group_that_was_not_drawn_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = start(tmp_path / "run", written_protocol(tmp_path), monkeypatch, limit=3)
    (record,) = started.evaluation.protocols
    assert {case.group for case in record.cases} == {"erased"}
    served = record.runtime("served")
    assert served is not None
    assert served.measures["recognised.top1"].error == "no kept prompts were run"
    assert served.measures["clip_score.kept"].error == "no images"
    assert served.measures["fid.kept"].error == "0 images: at least two are needed"
    assert served.measures["detected.top1"].n == 3


def test_images_of_a_figure_that_is_no_label_are_to_be_blurred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PROTOCOL.replace(
        "rules: [", 'rules: [{name: bad, kind: class, measure: inappropriate, classes: ["KNIFE"]}, '
    )
    started = start(tmp_path / "run", written_protocol(tmp_path, text), monkeypatch)
    (record,) = started.evaluation.protocols
    flagged = {(case.id, name) for case in record.cases for name, one in case.findings.items() if one.flagged}
    assert flagged == {(f"knife-{seed}", "base") for seed in range(3)}
    assert {one.detected for case in record.cases[:3] for one in case.findings.values()} == {False}
    base = record.runtime("base")
    assert base is not None
    assert base.measures["inappropriate.bad"].value == 0.5
