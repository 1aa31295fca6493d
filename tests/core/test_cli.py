"""The command line: exit statuses, one clear line, and no PyTorch before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
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
        "--method 'magic'": ("edit", model, "--method", "magic", *EDIT, "--out", out),
        "nothing to erase": ("edit", model, "--out", out),
        "is empty": ("edit", model, "--erase", " ", "--out", out),
        "is its own target": ("edit", model, "--erase", "gun", "--to", "gun", "--out", out),
        "twice": ("edit", model, "--erase", "gun", "--erase", "gun", "--out", out),
        "it is to be erased": ("edit", model, "--erase", "gun", "--keep", "gun", "--out", out),
        "neither a whole number nor auto": ("edit", model, *EDIT, "--epochs", "many", "--out", out),
        "is not a number": ("edit", model, *EDIT, "--keep-scale", "much", "--out", out),
        "must be NAME=VALUE": ("edit", model, *EDIT, "--parameter", "rho", "--out", out),
        "--out is missing": ("edit", model, *EDIT),
        "must end in .png": ("edit", model, *EDIT, "--curve", str(tmp_path / "c.gif"), "--out", out),
        "--device nothing": ("edit", model, *EDIT, "--device", "nothing", "--out", out),
        "doesn't exist: name a file": ("edit", model, "--erase-file", str(tmp_path / "no.txt"), "--out", out),
        "name a recipe file": ("edit", model, "--recipe", str(tmp_path / "no.yaml"), "--out", out),
        "--rank is for": ("apply", str(tmp_path / "none"), model, "--rank", "4", "--out", str(tmp_path / "x")),
        "such a file": ("import", str(tmp_path / "none.pt"), model, "--out", out),
        "--ridges": ("sweep", model, *EDIT, "--ridges", "a,b", "--out", str(tmp_path / "s")),
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


def test_explain_prints_a_recipe_that_does_the_same(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("edit", "anything", "--preset", "nudity", "--ridge", "0.2", "--explain") == 0
    text = capsys.readouterr().out
    assert "preset nudity" in text
    assert "command line" in text
    (tmp_path / "recipe.yaml").write_text(text)
    assert run("edit", "anything", "--recipe", str(tmp_path / "recipe.yaml"), "--explain", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["ridge"], again["epochs"], again["erase"]) == (0.2, 3, ["nudity"])


def test_lora_import_stack_and_difference(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, gun, edited = str(tiny_model), str(tmp_path / "gun.safetensors"), str(tmp_path / "edited")
    assert run("edit", model, *EDIT, "--out", gun) == 0
    assert run("apply", gun, model, "--out", edited) == 0
    for kind in ("lora", "kohya"):
        capsys.readouterr()
        assert run("apply", gun, model, "--as", kind, "--out", str(tmp_path / f"{kind}.safetensors"), "--json") == 0
        assert json.loads(capsys.readouterr().out)["relative_error"] < 1e-6
    unet = f"{edited}/unet/diffusion_pytorch_model.safetensors"
    assert run("import", unet, model, "--erased", "gun", "--out", str(tmp_path / "i.safetensors"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["source"]["shared"] is True
    assert run("apply", str(tmp_path / "i.safetensors"), model, "--out", str(tmp_path / "again")) == 0
    ours, theirs = load_edit(Path(gun)), load_edit(tmp_path / "i.safetensors")
    np.testing.assert_allclose(theirs.tensors["text.transform"], ours.tensors["text.transform"], atol=1e-3)
    capsys.readouterr()
    assert run("inspect", edited, "--base", model, "--json") == 0
    assert json.loads(capsys.readouterr().out)["text_sites_moved"] == 8
    assert "none of the checkpoint's" in failure(capsys, "inspect", model, "--base", model)
    knife, both = str(tmp_path / "knife.safetensors"), str(tmp_path / "both.safetensors")
    assert run("edit", edited, "--erase", "knife", "--to", "cat", "--out", knife) == 0
    assert run("stack", model, gun, knife, "--out", both) == 0
    assert "wasn't made for" in failure(capsys, "stack", model, knife, gun, "--out", str(tmp_path / "x.safetensors"))
    assert "edit 2" not in failure(capsys, "stack", model, knife, gun, "--out", str(tmp_path / "x.safetensors"))
    assert run("inspect", both) == 0


def test_a_curve_and_a_sweep(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = tmp_path / "curve.png"
    options = (*EDIT, "--epochs", "2")
    out = str(tmp_path / "e.safetensors")
    assert run("edit", str(tiny_model), *options, "--curve", str(curve), "--out", out) == 0
    assert curve.read_bytes().startswith(b"\x89PNG")
    sweep = tmp_path / "sweep"
    capsys.readouterr()
    assert run("sweep", str(tiny_model), *options, "--ridges", "1e-3,1", "--out", str(sweep), "--json") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["ridge"] for point in points] == [1e-3, 1.0]
    assert points[0]["moved"] != points[1]["moved"]
    assert {path.name for path in sweep.iterdir()} == {
        "sweep.json", "sweep.png", "ridge-0.001.safetensors", "ridge-1.safetensors"
    }  # fmt: skip


def test_patch_needs_no_torch_and_no_onnx(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits = [tmp_path / f"{concept}.safetensors" for concept in ("gun", "axe")]
    for edit in edits:
        assert run("edit", str(demo_model), "--erase", edit.stem, "--epochs", "1", "--out", str(edit)) == 0
    onnx = tmp_path / "onnx"
    assert run("export", str(demo_model), "--edit", str(edits[0]), "--out", str(onnx)) == 0
    capsys.readouterr()
    script = (
        "import sys; from excise.cli import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'onnx', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", script, "patch", str(onnx), "--edit", str(edits[1]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["manifest"]["edit"]["id"] == load_edit(edits[1]).id
    assert run("inspect", str(onnx)) == 0
    assert load_edit(edits[1]).id in capsys.readouterr().out
    assert "was made for another" not in failure(capsys, "patch", str(onnx), "--edit", str(tmp_path / "none"))
