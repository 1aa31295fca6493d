"""What a TensorRT engine was built from: ``model.engine.json`` beside ``model.engine``.

An engine says nothing of the ONNX file behind it and can't be opened without its GPU. The JSON holds both files'
hashes, so that an engine of another edit (stale) or one that was altered is told apart on any machine. Pure data: no
library of NVIDIA's is imported.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from excise.errors import ArtefactError
from excise.manifest import FileEntry, first_problem, hash_file

ENGINE = "model.engine"
FORMAT = 1

LibraryName = Literal["tensorrt", "tensorrt_rtx"]
Size = Annotated[int, Field(strict=True, ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Model):
    """Shapes that an input may have, each dimension between ``min`` and ``max``; an engine is tuned for ``opt``.

    One list in place of the three is a static shape.
    """

    min: tuple[Size, ...]
    opt: tuple[Size, ...]
    max: tuple[Size, ...]

    @model_validator(mode="before")
    @classmethod
    def _static(cls, value: object) -> object:
        return {"min": value, "opt": value, "max": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError(f"min, opt and max have {len(self.min)}, {len(self.opt)} and {len(self.max)} dimensions")
        for axis, (low, best, high) in enumerate(zip(self.min, self.opt, self.max, strict=True)):
            if not low <= best <= high:
                raise ValueError(f"dimension {axis} isn't min <= opt <= max: {low}, {best}, {high}")
        return self


class TensorEntry(_Model):
    """An input or output: its dtype in NumPy's words, and its shape, -1 where it is free."""

    dtype: str
    shape: tuple[int, ...]


class RefitEntry(_Model):
    """A weight that a refit replaces.

    Attributes:
        initializer: Its name in the ONNX file.
        engine_weight: Its name in the engine's refitter.
        transposed: Whether both hold the torch weight's transpose.
        dtype: Of the initialiser, in NumPy's words.
        shape: Of the initialiser.
    """

    initializer: str
    engine_weight: str
    transposed: bool
    dtype: str
    shape: tuple[int, ...]


class EngineEntry(_Model):
    """``model.engine.json``.

    Attributes:
        format: Version of this format.
        excise: Version of excise that wrote it.
        library: The library that built the engine.
        version: That library's version; an engine runs on this one.
        compute_capabilities: What it was built for, such as ``SM89``; none is the library's own choice.
        onnx: Name of the ONNX file, in the engine's folder.
        sources: Size and SHA-256 of the ONNX file and of its data files, by name.
        edit: Id of the edit that the engine carries; ``None`` for an unedited model.
        inputs: By name.
        outputs: By name.
        profiles: The shapes that the engine takes: one range for each input whose shape is free.
        refittable: What a refit replaces, by torch name; empty for an engine that can't be refitted.
        settings: Options of the build that change what is computed or how fast.
        engine: Size and SHA-256 of the engine.
    """

    format: int = FORMAT
    excise: str
    library: LibraryName
    version: str
    compute_capabilities: tuple[str, ...] = ()
    onnx: str
    sources: dict[str, FileEntry]
    edit: str | None = None
    inputs: dict[str, TensorEntry]
    outputs: dict[str, TensorEntry]
    profiles: tuple[dict[str, Range], ...] = ()
    refittable: dict[str, RefitEntry] = {}
    settings: dict[str, bool | int | None] = {}
    engine: FileEntry

    def to_json(self) -> str:
        """The entry as deterministic JSON, with a final newline."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def entry_path(engine: Path) -> Path:
    """Where the JSON of an engine lies: ``model.engine`` → ``model.engine.json``."""
    return engine.with_name(f"{engine.name}.json")


def network_name(edit_id: str | None, *, refittable: bool) -> str:
    """What an engine calls itself (``ICudaEngine.name``): a second witness of its edit.

    A refit can't change the name, so a refittable engine's names no edit: its JSON does.
    """
    return "excise.refittable" if refittable else f"excise.edit_id={edit_id or 'none'}"


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    return FileEntry(size=path.stat().st_size, sha256=hash_file(path))


def entry_of(data: memoryview) -> FileEntry:
    """Size and SHA-256 of bytes in memory."""
    return FileEntry(size=data.nbytes, sha256=hashlib.sha256(data).hexdigest())


def read_engine(engine: Path) -> EngineEntry:
    """Parse the JSON beside an engine.

    Raises:
        ArtefactError: The engine or its JSON is missing, or the JSON is of another format or malformed.
    """
    if not engine.is_file():
        raise ArtefactError(f"{engine} doesn't exist: build it with excise engines")
    path = entry_path(engine)
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtefactError(f"{engine} has no {path.name}: it wasn't built by excise; build it again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} can't be read ({error}): build the engine again") from error
    if not isinstance(raw, dict) or type(raw.get("format")) is not int or raw["format"] != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else None
        raise ArtefactError(f"{path} has format {found!r}, and this excise reads {FORMAT}: build the engine again")
    try:
        return EngineEntry.model_validate(raw)
    except ValidationError as error:
        raise ArtefactError(f"{path} is malformed: {first_problem(error)}") from error


def check_engine(engine: Path) -> list[str]:
    """Compare an engine, and the ONNX file and data files that it was built from, with its JSON.

    Returns:
        One line for each thing that is wrong, the engine's first; none for an engine that is as it was built and whose
        ONNX file is too.

    Raises:
        ArtefactError: as ``read_engine``.
    """
    entry = read_engine(engine)
    problems = []
    if _differs(engine, entry.engine):
        problems.append(f"{engine} was altered: its SHA-256 isn't that of {entry_path(engine).name}; build it again")
    for name, source in sorted(entry.sources.items()):
        path = engine.parent / name
        if not path.is_file():
            problems.append(f"{engine} can't be told from a stale one: {path} is missing")
        elif _differs(path, source):
            problems.append(f"{engine} is stale: it was built from another {name}; build it again")
    return problems


def _differs(path: Path, expected: FileEntry) -> bool:
    return path.stat().st_size != expected.size or hash_file(path) != expected.sha256
