"""The manifest ``excise.json``: what an artefact holds, which edit it carries, and where every edited weight went.

It lies in every folder that excise writes. ``write_manifest`` hashes the folder, ``read_manifest`` parses it back, and
``verify`` compares the folder with it. The JSON is deterministic (sorted keys, no dates), so equal artefacts have
equal manifests.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from excise.errors import ArtefactError

if TYPE_CHECKING:
    from excise.editfile import Edit

NAME = "excise.json"
FORMAT = 2
TOOLS = ("diffusers", "numpy", "onnx", "onnxruntime", "optimum", "optimum-onnx", "torch", "transformers")
_CHUNK = 1 << 22
_SHOW_PROGRESS_FROM = 200_000_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(path: str) -> str:
    """``path`` if it is relative, written with ``/`` and stays in its folder."""
    pure = PurePosixPath(path)
    if not path or "\\" in path or pure.is_absolute() or ".." in pure.parts or str(pure) != path:
        raise ValueError(f"{path!r} is not a path inside the folder")
    return path


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Model):
    """One file: its size in bytes and its SHA-256."""

    size: int = Field(ge=0)
    sha256: Sha256


class EditEntry(_Model):
    """The edit that the artefact carries.

    Attributes:
        id: SHA-256 of the edit file's content.
        summary: The edit on one line.
        sites: Names of the moved weights, relative to the UNet.
        concepts: What is erased, in the edit's words; empty where nobody noted it.
    """

    id: str = Field(min_length=1)
    summary: str
    sites: tuple[str, ...]
    concepts: tuple[str, ...] = ()

    @classmethod
    def of(cls, edit: Edit) -> EditEntry:
        """The entry of an edit."""
        concepts = tuple(dict.fromkeys(pair.erase for pair in edit.metadata.concepts))
        return cls(id=edit.id, summary=edit.summary, sites=edit.sites, concepts=concepts)


class BaseEntry(_Model):
    """The unedited model that the artefact was made from.

    Attributes:
        name: Hub id, or the last part of the folder's path.
        pipeline: Class of the pipeline, e.g. ``StableDiffusionPipeline``.
        weights: SHA-256 of each of the UNet's weight files; empty where the model came from the hub.
    """

    name: str
    pipeline: str
    weights: dict[str, Sha256] = {}


class WeightEntry(_Model):
    """Where one torch weight is in the artefact.

    Attributes:
        file: The ONNX file, relative to the artefact's folder.
        data: The external data file that holds the initialiser; None if the ONNX file itself does.
        offset: The initialiser's first byte in ``data``.
        node: Name of the node that reads the weight.
        initializer: Name of the initialiser.
        transposed: Whether the initialiser holds the weight's transpose (d × o in place of o × d). A vector may have
            axes of size 1 beside, as (c, 1, 1).
        dtype: The initialiser's, in NumPy's words.
        shape: The initialiser's.
        sha256: Of the initialiser's bytes, C order, little-endian.
        engine_weight: The weight's name in an engine's refitter, if there is an engine.
    """

    file: str
    node: str
    initializer: str
    transposed: bool
    dtype: str
    shape: tuple[int, ...]
    sha256: Sha256
    engine_weight: str | None = None
    data: str | None = None
    offset: int = Field(default=0, ge=0)

    _files_inside = field_validator("file", "data")(lambda path: path if path is None else _inside(path))


class Manifest(_Model):
    """``excise.json``.

    Attributes:
        format: Version of this format.
        kind: What the folder is, e.g. ``onnx-pipeline``.
        excise: Version of excise that wrote it.
        tools: Versions of the libraries that it was made with.
        base: The unedited model.
        edit: The edit; ``None`` for an unedited model.
        bank: The edits that requests choose from, in the order of ``edit_index``; ``None`` is the base.
        files: Every file of the folder but the manifest, by relative path.
        weights: Every weight that the edit moves or another may move, by torch name relative to the denoiser.
        base_weights: A safetensors file with the unedited float32 values of ``weights``; None if they weren't kept.
        parity: Measured figures, by name.
    """

    format: int = FORMAT
    kind: str
    excise: str
    tools: dict[str, str] = {}
    base: BaseEntry
    edit: EditEntry | None = None
    bank: tuple[EditEntry | None, ...] = ()
    files: dict[str, FileEntry]
    weights: dict[str, WeightEntry] = {}
    base_weights: str | None = None
    parity: dict[str, FiniteFloat] = {}

    @field_validator("files")
    @classmethod
    def _files_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in files:
            _inside(path)
        return files

    def to_json(self) -> str:
        """The manifest as deterministic JSON, with a final newline."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def tool_versions(names: tuple[str, ...] = TOOLS) -> dict[str, str]:
    """Versions of the installed distributions among ``names``; nothing is imported."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hash_file(path: Path, tick: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, read in blocks; ``tick`` is told the number of bytes after each."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
            if tick is not None:
                tick(len(block))
    return digest.hexdigest()


def _paths(folder: Path) -> list[str]:
    """Relative paths of every file below ``folder`` but the manifest, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(path for path in found if path != NAME)


def _hash_all(folder: Path, paths: list[str]) -> dict[str, FileEntry]:
    """Sizes and hashes of ``paths``; progress on stderr once there are more than 200 MB to read."""
    sizes = {path: (folder / path).stat().st_size for path in paths}
    total = sum(sizes.values())
    with ExitStack() as stack:
        tick = None
        if total > _SHOW_PROGRESS_FROM:
            from tqdm import tqdm

            bar = tqdm(total=total, unit="B", unit_scale=True, desc="hashing", file=sys.stderr, leave=False)
            tick = stack.enter_context(bar).update
        return {path: FileEntry(size=sizes[path], sha256=hash_file(folder / path, tick)) for path in paths}


def hash_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files, for a folder that has no manifest.

    Leaves out what no model is loaded from: hidden files and folders, and ``.md``. Files that are as they were, by
    their size and time, aren't read twice in a process.
    """
    paths = [path for path in _paths(folder) if not _untold(path)]
    states = [(path, (folder / path).stat()) for path in paths]
    return _hash_folder(folder.resolve(), tuple((path, state.st_size, state.st_mtime_ns) for path, state in states))


@cache
def _hash_folder(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    entries = _hash_all(folder, [path for path, _, _ in files])
    lines = [f"{entry.sha256}  {path}\n" for path, entry in entries.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _untold(path: str) -> bool:
    return path.endswith(".md") or any(part.startswith(".") for part in path.split("/"))


def write_manifest(
    folder: Path,
    *,
    kind: str,
    base: BaseEntry,
    edit: EditEntry | None = None,
    bank: Sequence[EditEntry | None] = (),
    weights: Mapping[str, WeightEntry] | None = None,
    base_weights: str | None = None,
    parity: Mapping[str, float] | None = None,
    tools: Mapping[str, str] | None = None,
    known: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Hash every file of ``folder`` and write its ``excise.json``, in place of one that is there.

    Args:
        folder: The finished artefact.
        kind, base, edit, bank, weights, base_weights, parity: See ``Manifest``.
        tools: Versions of libraries; by default those of ``TOOLS`` that are installed.
        known: Files that are as they were when they were hashed; those of the same size aren't read again.

    Raises:
        ArtefactError: A weight's ONNX file isn't in the folder, or a figure isn't finite.
    """
    paths = _paths(folder)
    kept = {path: entry for path, entry in (known or {}).items() if path in paths}
    if changed := [path for path, entry in kept.items() if (folder / path).stat().st_size != entry.size]:
        raise ArtefactError(f"{folder / changed[0]} isn't as long as its manifest says: export again")
    files = {**kept, **_hash_all(folder, [path for path in paths if path not in kept])}
    for name, weight in (weights or {}).items():
        for file in (weight.file, weight.data):
            if file is not None and file not in files:
                raise ArtefactError(f"{folder} has no {file}, which should hold {name}")
    try:
        manifest = Manifest(
            kind=kind,
            excise=version("excise"),
            tools=dict(tool_versions() if tools is None else tools),
            base=base,
            edit=edit,
            bank=tuple(bank),
            files=files,
            weights=dict(weights or {}),
            base_weights=base_weights,
            parity=dict(parity or {}),
        )
    except ValidationError as error:
        raise ArtefactError(f"the manifest of {folder} can't be written: {first_problem(error)}") from error
    (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's errors, on one line, with the field's name."""
    details = error.errors()[0]
    field = ".".join(str(part) for part in details["loc"])
    message = " ".join(details["msg"].removeprefix("Value error, ").split())
    return f"{field}: {message}" if field else message


def read_manifest(folder: Path) -> Manifest:
    """Parse ``folder``'s ``excise.json``.

    Raises:
        ArtefactError: There is none, it isn't JSON, its format is another version's, or a field is wrong.
    """
    path = folder / NAME
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        what = (
            "has no excise.json: it isn't an exported folder that excise wrote (a model: excise inspect --base)"
            if folder.exists()
            else "doesn't exist"
        )
        raise ArtefactError(f"{folder} {what}") from error
    except OSError as error:
        raise ArtefactError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} isn't JSON ({error}): export again") from error
    if not isinstance(raw, dict) or "format" not in raw:
        raise ArtefactError(f"{path} isn't a manifest of excise: it has no format version")
    if type(raw["format"]) is not int or raw["format"] != FORMAT:
        raise ArtefactError(
            f"{path} has format version {raw['format']!r}, and this excise reads version {FORMAT}: use the excise that "
            "wrote it, or export again"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise ArtefactError(f"{path} is malformed: {first_problem(error)}") from error


def verify(folder: Path) -> list[str]:
    """Compare ``folder`` with its manifest.

    Returns:
        One line for each file that is missing, altered or not in the manifest, sorted by path; empty if none.

    Raises:
        ArtefactError: The manifest itself can't be read.
    """
    expected = read_manifest(folder).files
    present = [path for path in _paths(folder) if (folder / path).is_file()]
    problems = {path: f"{path} is missing" for path in set(expected) - set(present)}
    problems |= {path: f"{path} is not in the manifest" for path in set(_paths(folder)) - set(expected)}
    unchanged_size = []
    for path in sorted(set(present) & set(expected)):
        size = (folder / path).stat().st_size
        if size == expected[path].size:
            unchanged_size.append(path)
        else:
            problems[path] = f"{path} was altered: {size} bytes, and the manifest says {expected[path].size}"
    for path, entry in _hash_all(folder, unchanged_size).items():
        if entry.sha256 != expected[path].sha256:
            problems[path] = f"{path} was altered: its SHA-256 isn't the manifest's"
    return [problems[path] for path in sorted(problems)]
