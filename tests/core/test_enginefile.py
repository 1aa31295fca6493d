"""The JSON beside an engine: read back as written, and it tells a stale engine from an altered one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from excise.enginefile import (
    EngineEntry,
    Range,
    RefitEntry,
    TensorEntry,
    check_engine,
    entry_of,
    entry_path,
    file_entry,
    network_name,
    read_engine,
)
from excise.errors import ArtefactError


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of an ONNX file with a data file, all three of a few bytes."""
    for name in ("model.onnx", "model.onnx_data", "model.engine"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    engine = tmp_path / "model.engine"
    entry = EngineEntry(
        excise="0",
        library="tensorrt",
        version="10.0",
        compute_capabilities=("SM90",),
        onnx="model.onnx",
        sources={name: file_entry(tmp_path / name) for name in ("model.onnx", "model.onnx_data")},
        edit="5e" * 32,
        inputs={"sample": TensorEntry(dtype="float16", shape=(-1, 4, 8, 8))},
        outputs={"out_sample": TensorEntry(dtype="float16", shape=(-1, 4, 8, 8))},
        profiles=({"sample": Range(min=(1, 4, 8, 8), opt=(2, 4, 8, 8), max=(4, 4, 8, 8))},),
        refittable={
            "k": RefitEntry(initializer="i", engine_weight="e", transposed=True, dtype="float16", shape=(4, 4))
        },
        settings={"tf32": True, "workspace_mib": None},
        engine=entry_of(memoryview(engine.read_bytes())),
    )
    entry_path(engine).write_text(entry.to_json())
    return engine


def test_what_is_written_is_read_back(engine: Path) -> None:
    text = (engine.parent / "model.engine.json").read_text()
    assert read_engine(engine).to_json() == text
    assert text.endswith("}\n")
    assert check_engine(engine) == []


def test_bytes_and_files_have_one_entry(engine: Path) -> None:
    assert entry_of(memoryview(engine.read_bytes())) == file_entry(engine)


@pytest.mark.parametrize("change", [lambda data: data + b"x", lambda data: data[::-1]], ids=["longer", "as long"])
def test_an_altered_engine_and_a_stale_one(engine: Path, change: Any) -> None:
    engine.write_bytes(change(engine.read_bytes()))
    assert check_engine(engine) == [
        f"{engine} was altered: its SHA-256 isn't that of model.engine.json; build it again"
    ]
    for name in ("model.onnx_data", "model.onnx"):
        path = engine.parent / name
        path.write_bytes(change(path.read_bytes()))
    assert check_engine(engine)[1:] == [
        f"{engine} is stale: it was built from another {name}; build it again"
        for name in ("model.onnx", "model.onnx_data")
    ]


def test_without_its_onnx_file_an_engine_cannot_be_told_from_a_stale_one(engine: Path) -> None:
    (engine.parent / "model.onnx").unlink()
    assert check_engine(engine) == [
        f"{engine} can't be told from a stale one: {engine.parent / 'model.onnx'} is missing"
    ]


def test_missing_files_are_told(engine: Path) -> None:
    entry_path(engine).unlink()
    with pytest.raises(ArtefactError, match=r"has no model.engine.json: it wasn't built by excise"):
        check_engine(engine)
    with pytest.raises(ArtefactError, match="doesn't exist: build it with excise engines"):
        read_engine(engine.parent / "other.engine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format=2), "has format 2, and this excise reads 1"),
        (lambda raw: raw.update(format=True), "has format True"),
        (lambda raw: raw.pop("format"), "has format None"),
        (lambda raw: raw.update(library="tvm"), "malformed: library: Input should be 'tensorrt' or 'tensorrt_rtx'"),
        (lambda raw: raw.update(extra=1), "malformed: extra: Extra inputs are not permitted"),
        (lambda raw: raw["engine"].update(sha256="x"), "malformed: engine.sha256"),
        (lambda raw: raw["profiles"][0]["sample"].update(min=[9, 4, 8, 8]), "dimension 0 isn't min <= opt <= max: 9"),
    ],
)
def test_what_is_malformed_is_one_line(engine: Path, change: Any, message: str) -> None:
    path = entry_path(engine)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match=message) as caught:
        check_engine(engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 99_999])
def test_what_is_not_json_is_one_line(engine: Path, content: bytes) -> None:
    entry_path(engine).write_bytes(content)
    with pytest.raises(ArtefactError, match=r"can't be read|has format None"):
        read_engine(engine)


def test_a_refittable_engine_names_no_edit() -> None:
    assert network_name("5e", refittable=False) == "excise.edit_id=5e"
    assert network_name(None, refittable=False) == "excise.edit_id=none"
    assert network_name("5e", refittable=True) == network_name(None, refittable=True) == "excise.refittable"
