"""The folder of one run: what it was started with, ``run.json``, and a lock against a second writer.

A run that is started again in its folder goes on only with what it was started with: other prompts, settings, runtimes
or versions would mix two evaluations in one report.
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from excise.errors import ArtefactError, OutputError
from excise.eval.cases import Case
from excise.eval.evaluation import Provenance
from excise.eval.image_file import ImageFormat
from excise.eval.image_generation import cases_digest
from excise.manifest import first_problem, tool_versions
from excise.output import PARTIAL

FORMAT: Final = 1
NAME, LOCK = "run.json", "run.lock"
#: Edits that were made for the run, before it began.
EDITS = "edits"

#: What the images and figures depend on.
PACKAGES = ("diffusers", "excise", "numpy", "onnxruntime", "pillow", "torch", "transformers")

_SHOWN = 3


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProtocolEntry(_Strict):
    """One protocol, as it is run."""

    version: int
    settings: dict[str, Any]  #: all that the figures depend on
    cases: int = Field(ge=1)
    cases_sha256: str

    @classmethod
    def of(cls, version: int, settings: Mapping[str, Any], cases: Sequence[Case]) -> Self:
        """The entry of a protocol with these cases."""
        return cls(version=version, settings=dict(settings), cases=len(cases), cases_sha256=cases_digest(cases))


class RuntimeEntry(_Strict):
    """One runtime: its source as given, and what its files said."""

    source: str
    edit: str | None = None
    manifest: str | None = None  #: SHA-256
    files: str | None = None  #: SHA-256 over the files of a folder without a manifest

    @classmethod
    def of(cls, source: str, served: Provenance) -> Self:
        """The entry of a runtime that serves this."""
        return cls(source=source, edit=served.edit, manifest=served.manifest, files=served.files)

    def depends_on(self, versions: Mapping[str, str]) -> dict[str, Any]:
        """What its images depend on, besides the edit and the settings."""
        return {"source": self.source, "manifest": self.manifest, "files": self.files, "versions": dict(versions)}


class RunConfiguration(_Strict):
    """``run.json``: all that a run's images and figures depend on."""

    format: Literal[1] = FORMAT
    protocols: dict[str, ProtocolEntry]
    runtimes: dict[str, RuntimeEntry]
    batch_size: int = Field(ge=1)
    image_format: ImageFormat = "png"
    versions: dict[str, str] = Field(default_factory=lambda: run_versions())

    def to_json(self) -> str:
        """Deterministic, with a final newline."""
        return self.model_dump_json(indent=2) + "\n"


def run_versions() -> dict[str, str]:
    """Of Python and ``PACKAGES``, those that are installed."""
    return {"python": platform.python_version(), **tool_versions(PACKAGES)}


@contextmanager
def open_run(folder: Path, configuration: RunConfiguration) -> Iterator[None]:
    """Hold a run's folder: a new one, or one that was started with the same configuration.

    Raises:
        OutputError: another process is writing to it, it was started with another configuration, it holds something
            else, or can't be written.
        ArtefactError: its ``run.json`` can't be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} can't be made: {error.strerror}") from error
    with _locked(folder):
        _settle(folder, configuration)
        yield


def read_configuration(folder: Path) -> RunConfiguration:
    """What a run was started with.

    Raises:
        ArtefactError: the folder has no ``run.json``, or none of this format.
    """
    file = folder / NAME
    try:
        return RunConfiguration.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{file} can't be read: {error.strerror}") from error
    except ValidationError as error:
        raise ArtefactError(f"{file} is no run of format {FORMAT}: {first_problem(error)}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder's lock. The system gives it back whatever ends the process, so that none is ever stale.

    While it is held the file says by whom; between runs it is empty, and it stays: who removes a lock's file lets two
    processes hold two of them.
    """
    file = folder / LOCK
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{folder} can't be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 20).decode(errors="replace").strip()
            who = f"process {holder}" if holder else "another process"
            raise OutputError(f"{who} is writing to {folder}: wait for it, or choose another folder") from error
        except OSError as error:
            raise OutputError(f"{folder} can't be locked: {error.strerror}; choose one on a local disk") from error
        with suppress(OSError):  # a full disk takes no name, but holds the lock
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _settle(folder: Path, configuration: RunConfiguration) -> None:
    """Write ``run.json``, or compare it."""
    file, partial = folder / NAME, folder / f"{PARTIAL}{NAME}"
    if file.is_file():
        there, here = (one.model_dump(mode="json") for one in (read_configuration(folder), configuration))
        if found := differences(there, here):
            shown = "; ".join(found[:_SHOWN]) + ("; …" if len(found) > _SHOWN else "")
            raise OutputError(f"{folder} holds a run with another configuration ({shown}): choose another folder")
        return
    if others := sorted(one.name for one in folder.iterdir() if one.name not in (LOCK, EDITS, partial.name)):
        raise OutputError(f"{folder} holds {others[0]} but no {NAME}: choose another folder, or empty it yourself")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(configuration.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError as error:
        raise OutputError(f"{file} can't be written: {error.strerror}") from error


def differences(there: Any, here: Any, place: str = "") -> list[str]:
    """What differs between two JSON values, one line each: the place, and what is on either side."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = {**there, **here}
        return [
            line
            for key in keys
            for line in differences(there.get(key), here.get(key), f"{place}.{key}" if place else str(key))
        ]
    return [] if there == here else [f"{place} is {_short(there)} there and {_short(here)} now"]


def _short(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
