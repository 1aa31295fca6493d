"""What the commands do so that Triton takes the timestep of an exported UNet."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from excise.console import say
from excise.errors import ArtefactError, OutputError, UsageError
from excise.output import PARTIAL, check_free


def has_scalar_timestep(folder: Path) -> bool:
    """Whether the UNet of an exported folder takes a scalar ``timestep``; False where there is no UNet.

    Raises:
        ArtefactError: Its file isn't an ONNX model, or is cut off.
    """
    from excise.serve.onnx_signature import read_signature

    file = folder / "unet" / "model.onnx"
    if not file.is_file():
        return False
    timestep = read_signature(file).inputs.get("timestep")
    return timestep is not None and not timestep.shape


@contextmanager
def with_vector_timestep(folder: Path, out: Path) -> Iterator[Path]:
    """An exported folder as Triton's backends take it, for what will be written to ``out``.

    That is ``folder`` itself, or where its ``timestep`` is a scalar a folder beside ``out`` for the time being, of hard
    links but for the UNet's graph. Errors name ``folder``.

    Raises:
        OutputError: ``out`` holds something, or can't be written.
        ArtefactError, MissingExtra: As ``vector_timestep_folder``.
    """
    if not has_scalar_timestep(folder):
        yield folder
        return
    from excise.export.vector_timestep import vector_timestep_folder

    check_free(out)
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=parent) as temporary:
        made = Path(temporary) / folder.absolute().name
        vector_timestep_folder(folder, made, progress=say)
        try:
            yield made
        except (ArtefactError, OutputError, UsageError) as error:
            raise type(error)(str(error).replace(str(made), str(folder))) from error


def vector_timestep_source(folder: Path) -> Callable[[Path, Path], object]:
    """What writes an exported folder, with a ``timestep`` of shape (1), as a version beside the present one."""

    def write(present: Path, out: Path) -> object:
        from excise.export.vector_timestep import vector_timestep_folder
        from excise.manifest import verify

        say(f"checking {folder}")
        if problems := [line for line in verify(folder) if not line.endswith("is not in the manifest")]:
            raise ArtefactError(f"{folder}: {problems[0]}; export again")
        return vector_timestep_folder(folder, out, like=present, progress=say)

    return write
