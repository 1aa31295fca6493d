"""``excise demo`` on the bundled model, small: it passes with its own export and fails with the unedited one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from excise.cli import main
from excise.demo import MODEL
from excise.demo import run as demo_run
from excise.eval.protocol import Protocol, demo_weapons
from excise.export.onnx_export import export_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")


def small() -> Protocol:
    return demo_weapons(images_per_erased=3, images_per_kept=1, num_inference_steps=12)


@pytest.fixture
def small_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "demo_weapons", small)


@pytest.mark.usefixtures("small_protocol")
def test_the_unedited_export_in_place_of_the_edited_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unedited = tmp_path / "unedited"
    export_pipeline(MODEL, unedited)
    assert main(["demo", "--out", str(tmp_path / "out"), "--onnx", str(unedited), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    failed = {check["name"] for check in document["checks"] if not check["passed"]}
    assert {"concept erased, edited onnx", "runtimes agree on detections"} <= failed
    assert "concept erased, edited torch" not in failed
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.usefixtures("small_protocol")
def test_its_own_export_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert document["runtimes"]["edited onnx"]["detections"] == document["runtimes"]["edited torch"]["detections"]
    assert {path.name for path in out.iterdir()} == {
        "edit.safetensors",
        "onnx",
        "report.json",
        "report.html",
        "grid.png",
    }
    assert main(["inspect", str(out / "onnx")]) == 0
    assert main(["inspect", str(out / "edit.safetensors")]) == 0
    capsys.readouterr()
    assert main(["demo", "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
