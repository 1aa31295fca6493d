"""The audit log: one JSON object a line for every image that was asked for, whatever became of it.

    {"time": "2026-01-31T12:00:00.123Z", "request_id", "key", "protocol", "model", "edit", "edit_id", "seed", "steps",
     "guidance_scale", "verdict", "outcome", "status"}

``key`` is the beginning of the SHA-256 of the client's API key, and ``tenant`` is there if the key belongs to one.
``prompt`` and ``negative_prompt`` are there only if the operator chose so. The file is only ever appended to; one that
was renamed or removed is opened anew at the next line, so that it can be rotated without a signal.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from excise.errors import OutputError


class AuditLog:
    """A file that is readable by its owner only. Safe to share between threads.

    Raises:
        OutputError: It can't be opened, or, of ``write``, written: an image that isn't recorded must not be served.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = Path(path), Lock()
        self._file, self._identity = self._opened()

    def write(self, **fields: Any) -> None:
        """Append one line with the time and ``fields``, which JSON can hold."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = (json.dumps({"time": now, **fields}) + "\n").encode()
        with self._lock:
            try:
                if self._file < 0 or self._moved():
                    self._close()
                    self._file, self._identity = self._opened()
                # One call, so that lines of several processes don't mix.
                written = os.write(self._file, line)
            except OSError as error:
                raise self._failed(error) from error
        if written != len(line):
            raise OutputError(f"audit log {self._path}: only a part of a line could be written, is the disk full?")

    def close(self) -> None:
        """Close the file; the next line would open it anew."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _opened(self) -> tuple[int, tuple[int, int]]:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError as error:
            raise self._failed(error) from error
        status = os.fstat(file)
        return file, (status.st_dev, status.st_ino)

    def _moved(self) -> bool:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return True
        return (status.st_dev, status.st_ino) != self._identity

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"audit log {self._path} can't be written: {error.strerror or error}")
