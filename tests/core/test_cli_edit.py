"""What the commands that make edits say and refuse, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from excise.cli import main
from excise.cli_solve import stage_lines
from excise.editfile import Edit, load_edit
from excise.editmetadata import StageFigures
from tests.core.test_editmetadata import metadata

EDIT = ("--erase", "gun", "--to", "sunflower", "--keep", "cat", "--no-cache")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error that a user can put right."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_sweep_is_refused_before_anything_is_solved(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "sweep")
    for options, message in (
        (("--ridges", "1,0"), "--ridge 0.0: give a positive number"),
        (("--ridges", "1", "--method", "uce"), "--ridges are values of RECE's λ: give --method rece"),
        (("--ridges", "1", "--epochs", "0"), "--epochs 1 or more or auto"),
    ):
        assert message in refusal(capsys, "sweep", str(tiny_model), *EDIT, *options, "--out", out)
    assert not list(tmp_path.iterdir())


def test_a_ridge_given_twice_is_solved_once(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert main(("sweep", str(tiny_model), *EDIT, "--ridges", "1,1.0,0.5", "--out", str(out), "--json")) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(point["ridge"], point["edit"]) for point in points] == [
        (1.0, "ridge-1.safetensors"),
        (0.5, "ridge-0.5.safetensors"),
    ]


def test_auto_without_a_certificate_is_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--epochs", "auto", "--no-certificate", "--out", str(tmp_path / "e.safetensors"))
    assert "needs the certificate" in refusal(capsys, "edit", str(tmp_path), *EDIT, *options)


def test_edits_that_do_not_follow_one_another_say_what_to_do(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gun, axe = (str(tmp_path / f"{concept}.safetensors") for concept in ("gun", "axe"))
    for path, concept in ((gun, "gun"), (axe, "axe")):
        assert main(("edit", str(tiny_model), "--erase", concept, "--no-cache", "--out", path)) == 0
    line = refusal(capsys, "stack", str(tiny_model), gun, axe, "--out", str(tmp_path / "both.safetensors"))
    assert "edit 2 (" in line
    assert line.endswith("make it for the folder that excise apply wrote")
    assert "--force" not in line


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"accepted": True}, ""),
        ({"accepted": False}, "  (left out: the margin gains too little)"),
        ({"detected": 0.25}, "  detected 25%"),
        ({"detected": 1.0, "detected_after": 0.5}, "  detected 100% → 50%"),
        ({"detected": 0.0, "accepted": False}, "  detected 0%  (left out: nothing is detected any more)"),
        (
            {"detected": 0.5, "detected_after": 0.75, "accepted": False},
            "  detected 50% → 75%  (left out: more is detected)",
        ),
        (
            {"detected": 0.5, "detected_after": 0.5, "accepted": False},
            "  detected 50% → 50%  (left out: the margin doesn't rise)",
        ),
    ],
)
def test_what_is_said_of_an_epoch(figures: dict[str, float], shown: str) -> None:
    stage = StageFigures(stage="epoch 1", stream="text", margin=0.12345, moved=0.001, **figures)  # type: ignore[arg-type]
    (line,) = stage_lines(Edit(metadata(stages=(stage,)), {}))
    assert line == f"  text epoch 1   margin 0.1235  kept moved 1.00e-03{shown}"


TRAIN = (
    "--method",
    "esd-x",
    "--erase",
    "gun",
    "--iterations",
    "2",
    "--parameter",
    "num_inference_steps=2",
    "--seed",
    "3",
)


def test_a_training_keeps_its_checkpoints_until_the_edit_is_written(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gun.safetensors"
    assert main(("edit", str(tiny_model), *TRAIN, "--out", str(out))) == 0
    shown = capsys.readouterr().out
    assert "esd-x: 'gun' → ''; 0 kept; 20 weights" in shown
    assert "  trained 2 iterations: loss " in shown
    assert [path.name for path in tmp_path.iterdir()] == ["gun.safetensors"]
    kept = tmp_path / "kept"
    other = tmp_path / "again.safetensors"
    assert main(("edit", str(tiny_model), *TRAIN, "--checkpoints", str(kept), "--out", str(other), "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["metadata"]["training"]["iterations"] == 2
    assert document["metadata"]["recipe"]["parameters"]["seed"] == 3
    assert sorted(path.name for path in kept.iterdir()) == ["state.safetensors", "training.json"]
    assert load_edit(out).id == load_edit(other).id == document["id"]


def test_a_training_that_was_interrupted_goes_on(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from excise.edit import trained_methods

    step, out = trained_methods.esd_step, tmp_path / "gun.safetensors"

    def stopping(*arguments: Any) -> Any:
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(trained_methods, "esd_step", stopping)
    assert main(("edit", str(tiny_model), *TRAIN, "--out", str(out))) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["gun.training"]
    monkeypatch.setattr(trained_methods, "esd_step", step)
    capsys.readouterr()
    assert main(("edit", str(tiny_model), *TRAIN, "--out", str(out))) == 0
    assert "resuming after iteration 1 of 2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gun.safetensors"]


def test_options_of_a_training_are_for_methods_that_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "e.safetensors"))
    for options, message in (
        (("--checkpoints", str(tmp_path / "c")), "--checkpoints is for methods that train: rece is solved in one go"),
        (("--iterations", "3"), "--iterations: unknown field"),
        (("--method", "esd-x", "--curve", "c.png"), "--curve draws the stages of a closed form: esd-x has none"),
    ):
        assert message in refusal(capsys, "edit", str(tmp_path), *EDIT, *options, *out)
    assert not list(tmp_path.iterdir())
