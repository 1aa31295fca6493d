"""A file that a user names, read no further than it may be long."""

from __future__ import annotations

from pathlib import Path

from excise.errors import UsageError
from excise.printable import printable


def read_named(path: Path, limit: int, *, folder: str, missing: str) -> bytes:
    """The file's content, at most ``limit`` + 1 bytes of it, so that the caller sees that it is longer.

    Args:
        folder: what to say where ``path`` is a folder, after its name.
        missing: the whole message where there is no such file.

    Raises:
        UsageError: It is a folder, isn't there, or can't be read.
    """
    shown = printable(path)
    if path.is_dir():
        raise UsageError(f"{shown} is a folder: {folder}")
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        raise UsageError(missing) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{shown} can't be read: {getattr(error, 'strerror', None) or error}") from error
