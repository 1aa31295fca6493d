"""The metadata of an ONNX file, read and written without the onnx package and without reading its weights.

An ONNX file is a protocol buffer ``ModelProto``: a sequence of fields, each a tag and a value. The graph is one field
(7), skipped by its length; each of ``metadata_props`` (14) is a ``StringStringEntryProto`` with a key (1) and a value
(2). Source: onnx.proto.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from excise.errors import ArtefactError
from excise.protobuf import Span, delimited, fields

#: Key of the id of the edit that a file carries.
EDIT_ID = "excise.edit_id"
#: Key of the JSON list of the ids that a bank holds, by ``edit_index``; null is the base.
BANK = "excise.bank"
#: The input by which each row of a bank's batch chooses its edit.
EDIT_INDEX = "edit_index"

_METADATA_PROPS = 14
_GRAPH = 7
_CHUNK = 1 << 22


def read_metadata(path: Path) -> dict[str, str]:
    """The key-value pairs of an ONNX file's metadata.

    Raises:
        ArtefactError: the file is missing, cut off or not an ONNX model.
    """
    with _opened(path) as stream:
        return dict(_entry(stream, span) for span in _fields(stream) if span.number == _METADATA_PROPS)


def read_edit_id(path: Path) -> str | None:
    """The id of the edit that an ONNX file says it carries; None for an unedited one.

    Raises:
        ArtefactError: as ``read_metadata``.
    """
    return read_metadata(path).get(EDIT_ID)


def write_metadata(source: Path, target: Path, entries: Mapping[str, str]) -> None:
    """Copy an ONNX file with ``entries`` in its metadata, in place of entries with the same keys.

    The file is copied in blocks, every other byte as it is. ``target`` is a new file.

    Raises:
        ArtefactError: ``source`` is missing, cut off or not an ONNX model.
    """
    with _opened(source) as stream, target.open("xb") as out:
        for span in _fields(stream):
            if span.number != _METADATA_PROPS or _entry(stream, span)[0] not in entries:
                _copy(stream, out, span.start, span.end)
        for key, value in entries.items():
            entry = b"".join(delimited(place, text.encode()) for place, text in ((1, key), (2, value)))
            out.write(delimited(_METADATA_PROPS, entry))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if not path.is_file():
        raise ArtefactError(f"{path} doesn't exist: name a folder that holds an exported pipeline")
    with path.open("rb") as stream:
        try:
            yield stream
        except EOFError as error:
            raise ArtefactError(f"{path} isn't an ONNX model, or is cut off: export it again") from error


def _fields(stream: BinaryIO) -> Iterator[Span]:
    """Every field of the model; there must be a graph."""
    graph = False
    for span in fields(stream, 0, os.fstat(stream.fileno()).st_size):
        graph |= span.number == _GRAPH
        yield span
    if not graph:
        raise EOFError


def _entry(stream: BinaryIO, span: Span) -> tuple[str, str]:
    """Key and value of a ``StringStringEntryProto`` field."""
    texts = {1: "", 2: ""}
    for part in fields(stream, span.value, span.end):
        stream.seek(part.value)
        texts[part.number] = stream.read(part.end - part.value).decode(errors="replace")
    return texts[1], texts[2]


def _copy(stream: BinaryIO, out: BinaryIO, start: int, end: int) -> None:
    stream.seek(start)
    while start < end:
        block = stream.read(min(_CHUNK, end - start))
        out.write(block)
        start += len(block)
