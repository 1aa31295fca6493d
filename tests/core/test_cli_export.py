"""``excise export`` with its options: what contradicts itself is refused at once, and each place of an edit works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from excise.cli import main
from excise.editfile import load_edit
from excise.manifest import read_manifest, verify


@pytest.fixture(scope="module")
def edits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("edits")
    made = []
    for concept in ("gun", "axe"):
        made.append(folder / f"{concept}.safetensors")
        given = ["edit", str(tiny_model), "--erase", concept, "--to", "sunflower", "--epochs", "1"]
        assert main([*given, "--out", str(made[-1])]) == 0
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--edit", "{0}", "--bank", "{1}"], "--edit and --bank: give one"),
        (["--with-base"], "--with-base is for a bank"),
        (["--site", "text-encoder"], "--site text-encoder needs --edit"),
        (["--engine-options", "{0}"], "needs --engine"),
        (["--options", "{0}"], "can't be read"),
    ],
)
def test_contradictions_are_refused_before_any_work(
    tiny_model: Path,
    edits: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    given = [option.format(*edits) for option in options]
    assert main(["export", str(tiny_model), *given, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "loading" not in errors
    assert not list(tmp_path.iterdir())


def test_a_bank_of_edits(
    tiny_model: Path, edits: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bank"
    given = [option for edit in edits for option in ("--bank", str(edit))]
    assert main(["export", str(tiny_model), *given, "--with-base", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ids = [load_edit(edit).id for edit in edits]
    assert [row and row["id"] for row in document["manifest"]["bank"]] == [None, *ids]
    assert verify(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]
    assert main(["inspect", str(out)]) == 0
    told = capsys.readouterr().out
    assert "edit 0    the base" in told
    assert all(one in told for one in ids)


def test_an_edit_behind_the_text_encoder(tiny_model: Path, edits: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "fused"
    given = ["--edit", str(edits[0]), "--site", "text-encoder", "--out", str(out)]
    assert main(["export", str(tiny_model), *given]) == 0
    manifest = read_manifest(out)
    assert manifest.kind == "onnx-fused"
    assert manifest.edit is not None
    assert manifest.edit.id == load_edit(edits[0]).id


def test_half_precision(tiny_model: Path, edits: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert main(["export", str(tiny_model), "--edit", str(edits[0]), "--dtype", "fp16", "--out", str(out)]) == 0
    assert {entry.dtype for entry in read_manifest(out).weights.values()} == {"float16"}
    assert main(["patch", str(out), "--edit", str(edits[1])]) == 0
    assert verify(out) == []
