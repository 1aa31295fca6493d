"""A dry run of a Triton repository: what would go wrong at its load, found without a Triton."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from excise.enginefile import ENGINE
from excise.errors import ExciseError
from excise.manifest import NAME, hash_file, read_manifest
from excise.onnx_metadata import read_edit_id
from excise.output import PARTIAL
from excise.serve.bank import read_bank
from excise.serve.config_fit import network_fit, pipeline_fit
from excise.serve.edit_policy import load_policy
from excise.serve.pbtxt import Message
from excise.serve.repository_record import (
    CONFIG,
    Record,
    VersionEntry,
    read_config_text,
    read_copy,
    read_record,
    served_versions,
)
from excise.serve.triton_models import image_shape
from excise.serve.triton_schema import schema, schema_problem
from excise.serve.version_folder import ONNX, POLICY, network_signature

_BACKENDS = Path("/opt/tritonserver/backends")


@dataclass(frozen=True)
class RepositoryCheck:
    """What is wrong, one line each, and what couldn't be told or is worth knowing."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, list[str]]:
        """Plain data for JSON."""
        return {name: list(lines) for name, lines in asdict(self).items()}


def check(repository: Path) -> RepositoryCheck:
    """Check configurations against Triton's schema and the networks, and every file against its manifest.

    Raises:
        ArtefactError: This is no repository of excise, or its record is damaged.
    """
    record = read_record(repository)
    files = _Files()
    problems: list[str] = []
    for step in (
        _configurations(repository, record),
        *(_version(repository, record, number, entry, files) for number, entry in sorted(record.versions.items())),
    ):
        try:
            problems += step
        except ExciseError as error:
            problems.append(str(error))
    return RepositoryCheck(tuple(dict.fromkeys(problems)), tuple(_notes(repository, record)))


class _Files:
    """Hashes of files, each file read once whatever its names are."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], str] = {}

    def problems(self, folder: Path) -> Iterator[str]:
        """One line for each file of a version's folder that isn't as its manifest says, or isn't in it."""
        expected = read_manifest(folder).files
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {NAME}
        for name in sorted({*expected, *there}):
            path = folder / name
            if name not in expected:
                if "__pycache__" not in path.parts:  # Python writes it when Triton imports model.py
                    yield f"{path} is not in the manifest: remove it"
            elif not path.is_file():
                yield f"{path} is missing"
            elif path.stat().st_size != expected[name].size or self._hash(path) != expected[name].sha256:
                yield f"{path} was altered: its SHA-256 isn't the manifest's"

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        key = stat.st_dev, stat.st_ino
        if key not in self._known:
            self._known[key] = hash_file(path)
        return self._known[key]


def _configurations(repository: Path, record: Record) -> Iterator[str]:
    present = repository / record.model / str(record.current) / ONNX
    for name in (record.model, *record.networks):
        config, source = read_config_text(repository, name), f"{name}/{CONFIG}"
        if problem := schema_problem((repository / name / CONFIG).read_text(encoding="utf-8")):
            yield f"{source} isn't one by Triton's schema: {problem}"
        if config.text("name") not in (None, name):
            yield f"{source} names the model {config.text('name')!r}: Triton wants its folder's name"
        served = served_versions(config)
        if name == record.model:
            if served != (record.current,):
                yield f"{source} serves versions {_list(served)}, and its record says {record.current}"
            yield from pipeline_fit(config, image_shape(present), source)
        else:
            if record.current not in (served or ()):
                yield f"{source} serves versions {_list(served)}, and the pipeline calls {record.current}"
            yield from network_fit(config, network_signature(present, name, record.backend), source)
        yield from _warmup(repository / name, config, source)


def _warmup(model: Path, config: Message, source: str) -> Iterator[str]:
    for sample in config.messages("model_warmup"):
        for entry in sample.messages("inputs"):
            for value in entry.messages("value"):
                file = value.text("input_data_file")
                if file is not None and not (model / "warmup" / file).is_file():
                    yield f"{source} warms up with {file}, which {model / 'warmup'} hasn't"


def _version(repository: Path, record: Record, number: int, entry: VersionEntry, files: _Files) -> Iterator[str]:
    folder = repository / record.model / str(number)
    if not (folder / NAME).is_file():
        yield f"{folder} is missing, and the record has version {number}"
        return
    if hash_file(folder / NAME) != entry.manifest:
        yield f"{folder / NAME} was altered: its SHA-256 isn't the record's"
    yield from files.problems(folder)
    onnx = folder / ONNX
    carried = [read_edit_id(onnx / name / "model.onnx") for name in ("unet", "text_encoder")]
    if (found := next(filter(None, carried), None)) != entry.edit:
        yield f"{onnx} carries edit {found}, and the record says {entry.edit}"
    ids = set(read_bank(onnx / "unet" / "model.onnx") or (entry.edit,))
    if ids != set(entry.edits.values()):
        yield f"{onnx} holds other edits than the record names for version {number}"
    if None in ids and not record.with_base:
        yield f"{folder} serves the unedited model, and the repository was built without --with-base"
    if (folder / POLICY).is_file():
        load_policy(folder / POLICY).check(entry.edits, str(folder / POLICY))
    for name in record.networks:
        network = repository / name / str(number)
        if not (network / NAME).is_file():
            yield f"{network} is missing, and the record has version {number}"
            continue
        yield from files.problems(network)
        held, exported = read_manifest(network).files, read_manifest(onnx).files
        for path, file in held.items():
            original = f"{name}/{ENGINE if path == 'model.plan' else path}"
            if exported.get(original) != file:
                yield f"{network / path} isn't {onnx / original}: the versions are out of step"


def _notes(repository: Path, record: Record) -> Iterator[str]:
    if read_copy(repository) != record:
        yield "repository.json is a step behind config.pbtxt, which counts: the next promote or rollback writes it"
    for number, entry in sorted(record.versions.items()):
        if not entry.canary:
            yield f"version {number} has no canary: what it computes isn't compared at its load"
    for name in (record.model, *record.networks):
        for path in sorted((repository / name).iterdir()):
            unknown = path.name.isdecimal() and int(path.name) not in record.versions
            if unknown or path.name.startswith(PARTIAL):
                yield f"{path} belongs to no version: the next promote removes what a killed one left"
    if schema() is None:
        yield "configurations weren't compared with Triton's schema: pip install 'tritonclient' protobuf"
    for backend in sorted({"python", record.backend}):
        if shutil.which("tritonserver") is None or not (_BACKENDS / backend).is_dir():
            yield f"nothing was loaded: there is no tritonserver with the backend {backend} here"


def _list(versions: tuple[int, ...] | None) -> str:
    return ", ".join(str(one) for one in versions) if versions else "of its own choice"
