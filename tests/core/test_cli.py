"""The command line: exit statuses, one clear line, and no PyTorch before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from excise import cli
from excise.cli import main
from excise.editfile import load_edit

EDIT = ("--erase", "gun", "--to", "sunflower", "--keep", "cat")


def run(*arguments: str) -> int:
    return main(arguments)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command fails with."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("excise: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_edit_inspect_apply(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gun.safetensors"
    assert run("edit", str(tiny_model), *EDIT, "--out", str(out), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["id"] == load_edit(out).id
    assert document["metadata"]["concepts"] == [{"erase": "gun", "to": "sunflower"}]
    assert run("inspect", str(out)) == 0
    assert document["id"] in capsys.readouterr().out
    assert run("apply", str(out), str(tiny_model), "--out", str(tmp_path / "edited")) == 0
    assert (tmp_path / "edited" / "model_index.json").exists()


def test_bad_input_is_one_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "e.safetensors")
    model = str(tiny_model)
    cases = {
        "is not a folder": ("edit", str(tmp_path / "none" / "x"), *EDIT, "--out", out),
        "unknown preset": ("edit", model, "--preset", "magic", *EDIT, "--out", out),
        "unknown method": ("edit", model, "--method", "magic", *EDIT, "--out", out),
        "nothing to erase": ("edit", model, "--out", out),
        "is empty": ("edit", model, "--erase", " ", "--out", out),
        "tokens, this model reads 24": ("edit", model, "--erase", "gun " * 40, "--out", out),
        "must end in .safetensors": ("edit", model, *EDIT, "--out", str(tmp_path / "e.pt")),
        "not a file": ("apply", str(tmp_path / "none"), model, "--out", str(tmp_path / "x")),
        "doesn't exist": ("inspect", str(tmp_path / "none")),
        "has no excise.json": ("inspect", str(tmp_path)),
    }
    for message, arguments in cases.items():
        assert message in failure(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_left_alone(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_text("mine")
    assert "exists already" in failure(capsys, "edit", str(tiny_model), *EDIT, "--out", str(mine))
    assert mine.read_text() == "mine"


def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("edit") == 2
    assert run("nonsense") == 2
    assert run("edit", "model", "--out", "x.safetensors", "--epochs", "many") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_exits_130(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("excise.editfile.save_file", interrupt)
    assert run("edit", str(tiny_model), *EDIT, "--out", str(tmp_path / "e.safetensors")) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_names_its_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("excise.edit.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'excise[edit]'" in failure(capsys, "edit", "m", *EDIT, "--out", "x.safetensors")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from excise.cli import main; status = main(['--help']); import excise.serve; "
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx'} & set(sys.modules); sys.exit(status or len(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_every_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"excise {command}" in capsys.readouterr().out.split("Example")[1]
