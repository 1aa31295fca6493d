"""``excise verify``: exit statuses, the report and the command that gives it again, and one clear line for errors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from excise.cli import cli, main
from excise.cli_verify import verify


@pytest.fixture(scope="module")
def edit_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit") / "gun.safetensors"
    assert main(["edit", str(tiny_model), "--erase", "gun", "--to", "cat", "--keep", "dog", "--out", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.commands, "verify", verify)


@pytest.fixture
def sides(tiny_model: Path, edit_file: Path) -> list[str]:
    """A, B and the base, all of PyTorch; few steps."""
    edited = f"torch:{tiny_model}?edit={edit_file}"
    return ["verify", edited, edited, "--base", str(tiny_model), "--steps", "2", "--timesteps", "2", "--prompts", "1"]


def figures(document: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = document["rows"]
    return rows


def test_a_pass_its_report_and_the_same_figures_again(
    sides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert main([*sides, "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert "1/3 the reference torch:" in captured.err
    assert document == json.loads((out / "report.json").read_text())
    assert document["passed"]
    assert document["prompts"]["erased"] == ["gun"]
    assert document["prompts"]["kept"] == ["dog"]
    assert document["source"] == "the edit file"
    assert (out / "trajectory.png").read_bytes().startswith(b"\x89PNG")
    last = (out / "reproduce.sh").read_text().splitlines()[-1].replace('--out "$1"', "--json")
    assert shlex.split(last)[:2] == ["exec", "excise"]
    assert shlex.split(last)[2:-1] == document["command"]
    assert main(shlex.split(last)[2:]) == 0
    assert figures(json.loads(capsys.readouterr().out)) == figures(document)


def test_a_failure_is_status_1_and_is_written_all_the_same(
    sides: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides[2] = str(tiny_model)
    assert main([*sides, "--out", str(tmp_path / "report")]) == 1
    text = capsys.readouterr().out
    assert "FAILED  denoiser on " in text
    assert "not moved" in text
    assert text.splitlines()[-1].startswith("failed: B differs from A in ")
    assert not json.loads((tmp_path / "report" / "report.json").read_text())["passed"]
    assert main([*sides, "--max-to-move", "1"]) == 0


def test_bad_input_is_one_line(
    sides: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    tiny = str(tiny_model)
    cases: dict[str, list[str]] = {
        "isn't a folder": ["verify", str(tmp_path / "none"), tiny, "--base", tiny],
        "no pipeline with a UNet": ["verify", tiny, str(tmp_path / "empty"), "--base", tiny],
        "what was erased isn't known": ["verify", tiny, tiny, "--base", tiny],
        "moves nothing on the erased prompts": [
            *["verify", tiny, tiny, "--base", tiny, "--erased", "gun", "--steps", "1", "--timesteps", "1"]
        ],
        "is not a file": [*sides, "--edit", str(tmp_path / "none.safetensors")],
        "is not empty": [*sides, "--out", str(tmp_path / "full")],
        "--max-to-move 2": [*sides, "--max-to-move", "2"],
        "--prompts 0": [*sides, "--prompts", "0"],
        "tokens": [*sides, "--kept", "cat " * 40],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2, message
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("excise: error: ")]
        assert len(lines) == 1
        assert message in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--help"]) == 0
    assert 'excise verify "SD_FOLDER?edit=nudity.safetensors" sd-onnx --base SD_FOLDER' in capsys.readouterr().out
