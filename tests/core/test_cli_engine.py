"""The command that builds engines, by the real TensorRT-RTX or a stand-in for what it calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from excise.cli_engine import builder, engine_options, engines, optional_builder
from excise.enginefile import EngineEntry, TensorEntry
from excise.errors import MissingExtra, UsageError
from excise.manifest import FileEntry

ENTRY = EngineEntry(
    excise="0",
    library="tensorrt_rtx",
    version="1.7",
    onnx="model.onnx",
    sources={},
    edit="5e" * 32,
    inputs={"sample": TensorEntry(dtype="float32", shape=(1,))},
    outputs={},
    engine=FileEntry(size=2_500_000, sha256="0" * 64),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What ``build_engines`` was called with, in place of calling it."""
    made: list[tuple[Any, ...]] = []

    def build(folder: Path, library: Any, options: Any, *, progress: Any, **where: Any) -> dict[str, EngineEntry]:
        made.append((folder, library, options, where))
        progress("building")
        return {"unet": ENTRY}

    monkeypatch.setattr("excise.export.engine_pipeline.build_engines", build)
    monkeypatch.setattr("excise.export.engine_library.load_library", lambda name: f"loaded {name}")
    return made


def test_the_command_builds_and_describes(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    options = tmp_path / "engines.yaml"
    options.write_text("images: {max: 8}")
    arguments = ["sd-onnx", "--options", str(options), "--out", "out", "--rebuild"]
    ran = CliRunner().invoke(engines, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    ((folder, library, given, where),) = calls
    assert (folder, library, given.images.max) == (Path("sd-onnx"), "loaded tensorrt-rtx", 8)
    assert where == {"out": Path("out"), "rebuild": True}
    assert ran.stdout == (
        "out\n  unet          tensorrt_rtx 1.7 for the library's own GPUs; edit 5e5e5e5e5e5e; no refit; 2.5 MB\n"
    )
    assert ran.stderr == "excise: building\n"


def test_json(calls: list[tuple[Any, ...]]) -> None:
    ran = CliRunner().invoke(engines, ["sd-onnx", "--library", "tensorrt", "--json"], catch_exceptions=False)
    document = json.loads(ran.stdout)
    assert document["folder"] == "sd-onnx"
    assert EngineEntry.model_validate(document["engines"]["unet"]) == ENTRY
    assert calls[0][1] == "loaded tensorrt"


def test_a_missing_library_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise MissingExtra(name, name)

    monkeypatch.setattr("excise.export.engine_library.load_library", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'excise\[tensorrt\]'"):
        builder("tensorrt", None)


def test_options_of_another_command(calls: list[tuple[Any, ...]]) -> None:
    """As ``excise export`` has them: nothing without ``--engine``, a builder with it."""

    @click.command()
    @engine_options
    def export(engine: str | None, engine_options: Path | None) -> None:
        build = optional_builder(engine, engine_options)
        click.echo("none" if build is None else ", ".join(build(Path("out"))))

    assert CliRunner().invoke(export, []).stdout == "none\n"
    assert CliRunner().invoke(export, ["--engine", "tensorrt-rtx"]).stdout == "unet\n"
    assert CliRunner().invoke(export, ["--engine", "openvino"]).exit_code == 2
    with pytest.raises(UsageError, match=r"--engine-options e.yaml needs --engine"):
        CliRunner().invoke(export, ["--engine-options", "e.yaml"], catch_exceptions=False)
