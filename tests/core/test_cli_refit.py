"""``excise refit``: what it asks for and what it prints; the refit itself is a stand-in's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from excise.cli import cli, main
from excise.cli_refit import refit
from excise.editfile import Edit, save_edit
from excise.enginefile import EngineEntry, RefitEntry
from excise.export.refit import Refitted
from excise.manifest import BaseEntry, FileEntry, Manifest
from excise.parity import Parity
from tests.random_edits import random_edit

PLACE = RefitEntry(initializer="w", engine_weight="w", transposed=True, dtype="float32", shape=(4, 4))
DONE = Refitted(
    entry=EngineEntry(
        excise="0",
        library="tensorrt",
        version="10.1",
        onnx="model.onnx",
        sources={},
        edit="5e" * 32,
        inputs={},
        outputs={},
        refittable={"to_k.weight": PLACE, "to_v.weight": PLACE},
        engine=FileEntry(size=1, sha256="0" * 64),
    ),
    manifest=Manifest(kind="onnx-pipeline", excise="0", base=BaseEntry(name="tiny", pipeline="P"), files={}),
    parity=Parity(relative=0.0123, max_abs=0.5, edit_relative=0.25, edit_max_abs=2.0),
)


@pytest.fixture
def edit() -> Edit:
    return random_edit({"to_k.weight": np.eye(4, dtype=np.float32)}, 1)


@pytest.fixture
def edit_file(edit: Edit, tmp_path: Path) -> Path:
    path = tmp_path / "edit.safetensors"
    save_edit(path, edit)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What ``refit`` was called with, in place of calling it."""
    made: list[tuple[Any, ...]] = []

    def stand_in(folder: Path, edit: Edit, library: Any, *, progress: Any, **where: Any) -> Refitted:
        made.append((folder, edit.id, library, where))
        progress("refitting")
        return DONE

    monkeypatch.setattr("excise.export.refit.refit", stand_in)
    return made


def test_the_command_refits_and_says_how_far_it_is(calls: list[Any], edit: Edit, edit_file: Path) -> None:
    ran = CliRunner().invoke(refit, ["sd-engines", "--edit", str(edit_file)], catch_exceptions=False)
    assert ran.exit_code == 0
    assert calls == [(Path("sd-engines"), edit.id, None, {"out": None, "force": False})]
    assert ran.stdout == (
        f"sd-engines\n  edit {edit.id[:12]}: {edit.summary}\n"
        "  unet/model.engine for tensorrt 10.1, 2 weights refitted; "
        "0.012 of the edit's movement from the patched ONNX model\n"
    )
    assert ran.stderr == "excise: refitting\n"


def test_every_option_and_json(calls: list[Any], edit: Edit, edit_file: Path) -> None:
    options = ["--edit", str(edit_file), "--library", "tensorrt-rtx", "--out", "out", "--force", "--json"]
    ran = CliRunner().invoke(refit, ["sd-engines", *options], catch_exceptions=False)
    assert calls == [(Path("sd-engines"), edit.id, "tensorrt-rtx", {"out": Path("out"), "force": True})]
    document = json.loads(ran.stdout)
    assert document["folder"] == "out"
    assert EngineEntry.model_validate(document["engine"]) == DONE.entry
    assert Manifest.model_validate(document["manifest"]) == DONE.manifest
    assert document["parity"] == DONE.parity.dict()


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.commands, "refit", refit)


@pytest.mark.usefixtures("_registered")
def test_a_folder_without_an_engine_is_one_line(
    edit_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["refit", str(tmp_path), "--edit", str(edit_file)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1] == (
        f"excise: error: {tmp_path}/unet/model.engine doesn't exist: build it with excise engines"
    )


@pytest.mark.usefixtures("_registered")
def test_usage(edit_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["refit", "sd-engines"]) == 2
    assert "Missing option '--edit'" in capsys.readouterr().err
    assert main(["refit", "sd-engines", "--edit", "missing.safetensors"]) == 2
    assert "missing.safetensors is not a file" in capsys.readouterr().err
    assert main(["refit", "sd-engines", "--edit", str(edit_file), "--library", "openvino"]) == 2
    assert "'openvino' is not one of" in capsys.readouterr().err
    assert main(["refit", "--help"]) == 0
    assert "excise refit sd-engines --edit nudity.safetensors" in capsys.readouterr().out
