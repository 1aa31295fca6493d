"""Replays: by hand-made counts, on runtimes that take text only, resumed, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from excise.errors import ArtefactError, UsageError
from excise.eval.attack_replay import Replay, refuses_embeddings, replay
from excise.eval.attack_report import ReplayReport, read_attack_report, write_attack_report
from excise.eval.attack_run import run_attacks
from excise.eval.attack_table import replay_table
from excise.eval.paired_outcomes import tango
from excise.eval.runtime_spec import parse_runtime
from excise.eval.statistics import clopper_pearson
from tests.eval.attack_world import FULL, GreyModel, LevelEmbedding, MarkAttack, TextOnly, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Marks bring three of five back, levels one of five, and three of eight need neither."""
    made = World(tmp_path)
    run_attacks(made.run(MarkAttack(), LevelEmbedding({"g1": FULL})))
    return made


def replayed(world: World, *specs: Any, **options: Any) -> ReplayReport:
    defaults: dict[str, Any] = {
        "folder": world.folder / "replay",
        "found": world.folder / "run",
        "choice": world.choice(),
        "specs": specs or (world.spec("served"),),
        "models": world.models(),
        "load_pipeline": None,
        "batch_size": 4,
        "progress": False,
        "open": world.open,
        "versions": {},
    }
    run = Replay(**{**defaults, **options})
    report = replay(run)
    write_attack_report(run.folder, report)
    return report


class Forgetful(GreyModel):
    """Another edit: nothing leaks, and marks of number 5 bring a gun back as well as its own."""

    def level(self, prompt: str) -> int:
        return FULL if "5" in prompt else super().level(prompt.replace("leak", "lead"))


def test_the_same_model_gives_the_same_outcomes(world: World) -> None:
    world.served = GreyModel("served", edited=True)
    report = replayed(world)
    marks, levels = report.runtimes[0].results
    assert (marks.name, marks.n, levels.name, levels.n) == ("marks", 8, "levels", 8)
    assert marks.asr is not None
    assert levels.asr is not None
    assert (marks.asr.value, marks.attacked_asr.value) == (6 / 8, 6 / 8)
    assert (levels.asr.value, levels.attacked_asr.value) == (4 / 8, 4 / 8)
    assert marks.measures["flips"].value == levels.measures["flips"].value == 0
    assert read_attack_report(world.folder / "replay", ReplayReport) == report
    # With everything there, no model is opened.
    world.served = None
    assert replayed(world) == report


def test_another_model_by_hand(world: World) -> None:
    """Of the eight, two that leaked are gone and number 5 is back."""
    world.served = Forgetful("served", edited=True)
    report = replayed(world)
    marks = report.runtimes[0].results[0]
    assert marks.asr is not None
    assert marks.asr.value == 5 / 8
    assert (marks.asr.low, marks.asr.high) == (clopper_pearson(5, 8).low, clopper_pearson(5, 8).high)
    assert marks.measures["flips"].value == 3
    assert marks.measures["flips_p_value"].value == 1.0  # two against one
    assert marks.measures["increase"].value == -1 / 8
    assert (marks.measures["increase"].low, marks.measures["increase"].high) == tango(1, 2, 8)
    cases = {(one.case, one.attack): (one.attacked, one.outcomes) for one in report.cases}
    assert cases["g5", "marks"] == (False, {"served": True})
    assert cases["g6", "pre"] == (True, {"served": False})
    text = replay_table(report)
    assert "served   marks" in text
    assert "62.5 %" in text


def test_a_server_is_replayed_with_text_alone(world: World) -> None:
    world.served = TextOnly(GreyModel("served", edited=True))
    server = parse_runtime("served=openai:http://localhost:1?size=8x8")
    report = replayed(world, server)
    marks, levels = report.runtimes[0].results
    assert marks.asr is not None
    assert levels.asr is None
    assert levels.not_replayed is not None
    assert "takes text, not embeddings" in levels.not_replayed
    assert "served, levels: not replayed: openai takes text" in replay_table(report)
    text = (world.folder / "run" / "found.jsonl").read_text().splitlines()
    (world.folder / "only").mkdir()
    levels_only = [line for line in text if '"attack":"levels"' in line]
    (world.folder / "only" / "found.jsonl").write_text("\n".join(levels_only) + "\n")
    (world.folder / "run" / "embeddings.safetensors").rename(world.folder / "only" / "embeddings.safetensors")
    with pytest.raises(UsageError, match="nothing can be replayed: openai takes text, not embeddings"):
        replayed(world, server, found=world.folder / "only", folder=world.folder / "second")


def test_a_runtime_that_turns_out_to_take_none(world: World) -> None:
    world.served = TextOnly(GreyModel("served", edited=True))
    with pytest.raises(UsageError, match="served takes no embeddings: name a torch: or onnx: folder"):
        replayed(world)


def test_text_needs_no_embeddings_and_embeddings_their_file(world: World) -> None:
    world.served = GreyModel("served", edited=True)
    (world.folder / "run" / "embeddings.safetensors").unlink()
    with pytest.raises(ArtefactError, match="can't be read as embeddings"):
        replayed(world)
    file = world.folder / "copied.jsonl"
    lines = (world.folder / "run" / "found.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"attack":"levels"' not in line))
    assert [one.name for one in replayed(world, found=file).runtimes[0].results] == ["marks"]


def test_only_what_needed_no_attack(world: World) -> None:
    world.served = GreyModel("served", edited=True)
    file = world.folder / "copied.jsonl"
    lines = (world.folder / "run" / "found.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"attack":"pre"' in line))
    (result,) = replayed(world, found=file).runtimes[0].results
    assert (result.name, result.n, result.attacked_asr.value) == ("pre", 3, 1)


def test_findings_of_other_prompts_are_refused(world: World) -> None:
    rows = (world.folder / "own.csv").read_text()
    (world.folder / "own.csv").write_text(rows.replace("a gun number 3", "a gun number 30"))
    with pytest.raises(UsageError, match="case g3 has another prompt there of grey-guns"):
        replayed(world)
    (world.folder / "own.csv").write_text(rows.replace("g3,", "h3,"))
    with pytest.raises(UsageError, match="case g3 isn't a case of grey-guns"):
        replayed(world)
    (world.folder / "empty.jsonl").write_text("")
    with pytest.raises(ArtefactError, match="holds no findings"):
        replayed(world, found=world.folder / "empty.jsonl")
    with pytest.raises(ArtefactError, match="can't be read"):
        replayed(world, found=world.folder / "nowhere.jsonl")


def test_an_edit_behind_the_text_encoder_isnt_passed_by(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    from excise.onnx_metadata import EDIT_ID

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    for folder, edited in (("plain", False), ("fused", True)):
        model = helper.make_model(graph)
        if edited:
            model.metadata_props.add(key=EDIT_ID, value="a" * 64)
        (tmp_path / folder / "text_encoder").mkdir(parents=True)
        save(model, tmp_path / folder / "text_encoder" / "model.onnx")
    assert refuses_embeddings(parse_runtime(f"a=onnx:{tmp_path / 'plain'}")) is None
    reason = refuses_embeddings(parse_runtime(f"a=onnx:{tmp_path / 'fused'}"))
    assert reason is not None
    assert "behind the text encoder, which embeddings would pass by" in reason
    assert refuses_embeddings(parse_runtime(f"a=torch:{tmp_path / 'plain'}")) is None
