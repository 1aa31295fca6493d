"""A changed ONNX model in a new file, with the data files that it refers to beside it.

Data files become hard links unless asked otherwise, or copies where links don't work: excise replaces files and never
writes into one. ONNX Runtime reads hard links; the onnx package from 1.21 on refuses data with several, on either side.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from excise.errors import ArtefactError, OutputError
from excise.output import check_free, hard_linked, new_file

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

#: Protocol buffers hold no more than 2 GB; beyond that, weights have to lie beside the model.
_LIMIT = 2**31 - 1


def write_changed(model: ModelProto, source: Path, out: Path, *, link: bool = True) -> None:
    """Write ``model``, which was read from ``source``, to the new file ``out``, and bring its data files along.

    In ``source``'s own folder nothing but the model is written. Without ``link``, data files are copied.

    Raises:
        OutputError: ``out`` or a data file beside it exists already, or can't be written.
        ArtefactError: A data file is missing or lies outside ``source``'s folder, or the model is over 2 GB.
    """
    check_free(out)
    if model.ByteSize() > _LIMIT:
        raise ArtefactError(f"{out} would be over 2 GB with its transforms: use fewer edits, or a model in float16")
    locations = sorted(set(_locations(model, source)))
    beside = out.absolute().parent.resolve() == source.absolute().parent.resolve()
    made: list[Path] = []
    try:
        with new_file(out) as partial:
            partial.write_bytes(model.SerializeToString())
            for location in () if beside else locations:
                _bring(source.parent / location, out.parent / location, link)
                made.append(out.parent / location)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def _locations(model: ModelProto, source: Path) -> Iterator[str]:
    """Names of the data files, each checked to be in ``source``'s folder."""
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            path = PurePosixPath(entry.value)
            if path.is_absolute() or ".." in path.parts or not (source.parent / path).is_file():
                raise ArtefactError(f"{source} keeps weights in {entry.value}, which isn't in its folder: export again")
            yield entry.value


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _bring(source: Path, target: Path, link: bool) -> None:
    """A hard link, or a copy where links don't work or aren't wanted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if link and hard_linked(source, target):
            return
    except FileExistsError as error:
        raise OutputError(f"{target} exists already: choose another folder") from error
    with new_file(target) as partial:
        shutil.copyfile(source, partial)
