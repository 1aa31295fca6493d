"""Outputs that appear whole or not at all, and never replace what is there.

Everything is written beside its final place under a name that starts with ``.excise-partial-`` and renamed at the end;
on any error, Ctrl-C included, the partial output is removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from excise.errors import OutputError

PARTIAL = ".excise-partial-"


def check_free(path: Path) -> None:
    """Raise ``OutputError`` unless ``path`` is absent or an empty folder, so that long work can refuse at once."""
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise OutputError(f"{path} is not empty: choose another folder, or empty it yourself")
    elif path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists already: choose another name")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} can't be written: {parent} is not a folder that you may write to")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ``OutputError``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path} was not written: no space left on the disk") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise OutputError(f"{path} can't be written: {error.strerror}") from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes ``path``, otherwise nothing is left.

    Raises:
        OutputError: ``path`` holds something already, can't be written, or the disk is full.
    """
    check_free(path)
    with _writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.absolute().parent))
        try:
            partial.chmod(0o755)
            yield partial
            if path.is_dir():
                path.rmdir()
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of the folder ``path`` in one step.

    The two folders change names at once (Linux's ``renameat2`` with ``RENAME_EXCHANGE``), so that at every moment
    ``path`` is the old folder or the new one, whole; then the old one is removed.

    Raises:
        OutputError: the disk is full, or the folder can't be replaced like that here (another system, a mount point).
    """
    real = path.resolve()
    with _writing(path):
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=real.parent))
        try:
            partial.chmod(real.stat().st_mode & 0o777)
            yield partial
            _exchange(partial, real)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Let two folders of one file system change names in one step."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        number = errno.ENOSYS
    else:
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
        done = renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange)
        number = ctypes.get_errno() if done else 0
    if number:
        raise OutputError(
            f"{second} can't be replaced in one step here ({os.strerror(number)}): name another folder with --out"
        )


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write one file to; on success it becomes ``path``, otherwise nothing is left.

    Raises:
        OutputError: ``path`` exists already, can't be written, or the disk is full.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file")
    check_free(path)
    with _writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PARTIAL, suffix=path.suffix, dir=path.absolute().parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o644)
            # link() refuses an existing name, so a file that appeared meanwhile is never replaced.
            os.link(partial, path)
        except FileExistsError as error:
            raise OutputError(f"{path} exists already: choose another name") from error
        finally:
            partial.unlink(missing_ok=True)


def put_in_place(path: Path, data: bytes) -> None:
    """Write a file in one step, in place of one of the same name; after an error nothing is changed.

    Raises:
        OSError: It can't be written, or the disk is full.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def hard_linked(source: Path, target: Path) -> bool:
    """Make ``target`` another name of the file ``source``; False where the file system can't (another disk, no links).

    A symbolic link gets another name itself, not what it points to.

    Raises:
        FileNotFoundError: ``source`` isn't there.
        FileExistsError: ``target`` is there already.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        return False
    return True
