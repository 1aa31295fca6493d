"""The steps by which a Triton repository changes, each of them safe to be killed in.

The record in the pipeline's ``config.pbtxt`` is the state. Folders that it doesn't name are on their way in or out.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from excise.errors import ArtefactError, OutputError
from excise.manifest import NAME
from excise.output import PARTIAL, put_in_place
from excise.serve.pbtxt import Message, write
from excise.serve.repository_record import (
    CONFIG,
    COPY,
    Record,
    parameter,
    read_config_text,
    read_record,
    served,
    served_versions,
)
from excise.serve.triton_control import TritonServer
from excise.serve.triton_models import FEW_STEPS, MAX_STEPS
from excise.serve.version_folder import discard


@contextmanager
def locked(repository: Path) -> Iterator[Record]:
    """Nobody else changes the repository meanwhile; the operating system's errors become ``OutputError``."""
    model = repository / read_record(repository).model
    handle = None
    try:
        handle = os.open(model, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{repository} is being changed by another promote or rollback: wait for it") from error
        yield read_record(repository)
    except OSError as error:
        raise OutputError(f"{repository} can't be changed: {error.strerror or error}") from error
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def staging(model: Path) -> Iterator[Path]:
    """A folder beside a model's versions, under a name that Triton takes for none; gone at the end, if not renamed."""
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=model))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def switch(
    repository: Path, old: Record, new: Record, server: TritonServer | None, say: Callable[[str], None]
) -> str | None:
    """Serve ``new``'s version.

    Where the networks are models of their own, Triton runs the canary only in a request: once loaded, the version is
    asked for one image, and an answer that it can't is a refusal like any other.

    Returns:
        Why the server refused it, and everything is as before; None if it is served.

    Raises:
        ArtefactError: The server went away, or didn't load the old version again, so that nobody knows which version
            it has; the message says which one the repository names.
    """
    models = [*old.networks, old.model]
    before = {name: read_config_text(repository, name) for name in models}
    reason = None
    for name in models:
        # Networks first, both versions: whichever pipeline is loaded finds its own.
        after = new.written_into(before[name]) if name == old.model else served(before[name], new.kept_loaded_with(old))
        write_config(repository, name, after)
        try:
            reason = server.load(name, new.current) if server is not None else None
            if server is not None and reason is None and name == old.model and old.networks:
                reason = _tried(server, new, after, say)
        except ArtefactError as error:
            raise _unknown(repository, str(error)) from error
        if reason is not None:
            reason = f"{name}: {reason}"
            break
    if reason is None:
        put_in_place(repository / COPY, f"{new.to_json()}\n".encode())
        return None
    for name in reversed(models):
        write_config(repository, name, before[name])
    if server is not None and (problems := _set_back(server, models, old.current)):
        problem = f"Triton refused version {new.current}: {reason}; and then the old one: {problems[0]}"
        raise _unknown(repository, problem)
    return reason


def _set_back(server: TritonServer, models: list[str], version: int) -> list[str]:
    """Have the old version loaded again, all models of it; one line for each that isn't.

    Where it never stopped, this only tells the server its configuration.
    """
    problems = []
    for name in models:
        try:
            reason = server.load(name, version)
        except ArtefactError as error:
            reason = str(error)
        if reason is not None:
            problems.append(f"{name}: {reason}")
    return problems


def _tried(server: TritonServer, new: Record, config: Message, say: Callable[[str], None]) -> str | None:
    """Ask the pipeline's new version for one image of a few steps; why it can't, None where it can."""
    if any(True in policy.all("decoupled") for policy in config.messages("model_transaction_policy")):
        # Triton answers such models on a gRPC stream alone.
        say(f"version {new.current} streams, and isn't asked for an image: see excise_canary_ok in its metrics")
        return None
    say(f"asking version {new.current} for an image")
    steps = min(FEW_STEPS, int(parameter(config, MAX_STEPS) or FEW_STEPS))
    # Not the empty prompt: as the first one that is the warm-up's, which gets an image whatever the canary found.
    columns = {"PROMPT": ("BYTES", "a photo"), "NUM_INFERENCE_STEPS": ("INT32", steps)}
    taken = {one.text("name") for one in config.messages("input")}
    document = {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": [1, 1], "data": [value]}
            for name, (datatype, value) in columns.items()
            if name in taken
        ],
        "outputs": [{"name": "IMAGES", "parameters": {"binary_data": True}}],
    }
    return server.infer(new.model, new.current, document)


def _unknown(repository: Path, problem: str) -> ArtefactError:
    """The error where nobody knows which version the server has."""
    state = read_record(repository).current
    return ArtefactError(
        f"{problem}; {repository} says version {state}: see excise serve status --url, then roll back or repeat"
    )


def write_record(repository: Path, record: Record) -> None:
    """Make ``record`` the state: the pipeline's configuration, and then the copy for people."""
    config = read_config_text(repository, record.model)
    write_config(repository, record.model, record.written_into(config))
    put_in_place(repository / COPY, f"{record.to_json()}\n".encode())


def write_config(repository: Path, model: str, config: Message) -> None:
    """Put a model's ``config.pbtxt`` in place, in one rename."""
    put_in_place(repository / model / CONFIG, write(config).encode())


def tidy(repository: Path, record: Record) -> None:
    """Remove what no record names: versions, and what a killed promotion left."""
    (repository / f"{PARTIAL}{COPY}").unlink(missing_ok=True)
    for name in (*record.networks, record.model):
        if name != record.model:
            config = read_config_text(repository, name)
            if set(served_versions(config) or ()) - set(record.versions):
                write_config(repository, name, served(config, record.kept_loaded))
        for path in sorted((repository / name).iterdir()):
            if path.name.startswith(PARTIAL):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.name.isdecimal() and int(path.name) not in record.versions and (path / NAME).is_file():
                discard(path)
