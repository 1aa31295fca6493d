"""What an attack found, ``found.jsonl``: one line a case, on the disk before the next case is begun.

A process may be ended anywhere: a last line without its end was being written, and goes when the attack is started
again. ``embeddings.safetensors`` beside it holds the embeddings of attacks that make no text, ``row`` by ``row``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from excise.errors import ArtefactError, OutputError
from excise.eval.attack import Found, PromptEmbedding
from excise.manifest import first_problem
from excise.output import put_in_place

NAME, EMBEDDINGS = "found.jsonl", "embeddings.safetensors"

#: The attack of a line that no attack was needed for.
PRE = "pre"


class FoundFile:
    """A ``found.jsonl`` that is added to; one process at a time, which ``run_folder.open_run`` sees to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resume(self) -> list[Found]:
        """The lines that are there, after one that was cut off has been removed.

        Raises:
            ArtefactError: a whole line that is no finding, or two of one case and attack.
            OutputError: the file can't be written.
        """
        if not self.path.exists():
            return []
        whole, _, torn = _content(self.path).rpartition(b"\n")
        if torn:
            try:
                os.truncate(self.path, len(whole) + 1 if whole else 0)
            except OSError as error:
                raise OutputError(f"{self.path} can't be written: {error.strerror}") from error
        return _parsed(self.path, whole)

    def append(self, found: Found) -> None:
        """Add a line; it is on the disk when this returns, and after an error there is nothing of it.

        Raises:
            OutputError: it can't be written, or the disk is full.
        """
        line = (found.model_dump_json() + "\n").encode()
        new = not self.path.exists()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                before = os.fstat(handle).st_size
                if (written := os.write(handle, line)) < len(line):
                    os.ftruncate(handle, before)
                    raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes fit")
                os.fsync(handle)
            finally:
                os.close(handle)
            if new:
                _sync_folder(self.path.parent)
        except OSError as error:
            reason = "no space is left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise OutputError(
                f"{self.path} can't be written: {reason}; what is done stays: put that right and start again"
            ) from error


def read_found(path: Path) -> tuple[Path, tuple[Found, ...]]:
    """A finished ``found.jsonl``, or the folder that it is in: its path and lines, at least one.

    Raises:
        ArtefactError: there is none, it is empty or cut off, or a line is no finding.
    """
    file = path / NAME if path.is_dir() else path
    content = _content(file)
    if content and not content.endswith(b"\n"):
        raise ArtefactError(f"{file} ends within a line: the attack was ended; start it again and it goes on")
    lines = _parsed(file, content.removesuffix(b"\n"))
    if not lines:
        raise ArtefactError(f"{file} holds no findings: name the {NAME} of excise attack")
    return file, tuple(lines)


def write_embeddings(path: Path, rows: Sequence[PromptEmbedding]) -> None:
    """All embeddings, (tokens, d) each, in one step.

    Raises:
        OutputError: the file can't be written.
    """
    try:
        put_in_place(
            path, save({str(number): np.ascontiguousarray(row, np.float32) for number, row in enumerate(rows)})
        )
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error


def read_embeddings(path: Path) -> Mapping[int, PromptEmbedding]:
    """Row → embedding, float32 with shape (tokens, d).

    Raises:
        ArtefactError: there is no such file, or it holds something else.
    """
    try:
        rows = load_file(path)
        found = {int(name): np.asarray(array, np.float32) for name, array in rows.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtefactError(
            f"{path} can't be read as embeddings ({str(error).partition(chr(10))[0]}): copy it with {NAME}"
        ) from error
    if any(row.ndim != 2 or not np.isfinite(row).all() for row in found.values()):
        raise ArtefactError(f"{path} holds something else than finite embeddings of shape (tokens, d): attack again")
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{path} can't be read: {error.strerror}") from error


def _parsed(path: Path, content: bytes) -> list[Found]:
    lines: list[Found] = []
    seen: set[tuple[str, str]] = set()
    for number, text in enumerate(content.split(b"\n") if content else [], 1):
        try:
            found = Found.model_validate_json(text)
        except ValidationError as error:
            raise ArtefactError(f"{path}:{number} is no finding: {first_problem(error)}") from error
        if (found.case, found.attack) in seen:
            raise ArtefactError(f"{path}:{number}: case {found.case} stands twice for {found.attack}: remove a line")
        seen.add((found.case, found.attack))
        lines.append(found)
    return lines


def _sync_folder(folder: Path) -> None:
    """The file's name on the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
