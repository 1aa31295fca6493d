"""The metadata of an ONNX file, read and written without the onnx package and without reading its weights.

An ONNX file is a protocol buffer ``ModelProto``: a sequence of fields, each a tag and a value. The graph is one field
(7), skipped by its length; each of ``metadata_props`` (14) is a ``StringStringEntryProto`` with a key (1) and a value
(2). Source: onnx.proto and the encoding of protocol buffers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from excise.errors import ArtefactError

#: Key of the id of the edit that a file carries.
EDIT_ID = "excise.edit_id"
#: Key of the JSON list of the ids that a bank holds, by ``edit_index``; null is the base.
BANK = "excise.bank"

_METADATA_PROPS = 14
_GRAPH = 7
_CHUNK = 1 << 22


def read_metadata(path: Path) -> dict[str, str]:
    """The key-value pairs of an ONNX file's metadata.

    Raises:
        ArtefactError: the file is missing, cut off or not an ONNX model.
    """
    with _opened(path) as stream:
        found = {}
        for number, start, end in _fields(stream, path):
            if number == _METADATA_PROPS:
                key, value = _entry(stream, start, end, path)
                found[key] = value
        return found


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
        done = 0
        for number, start, end in _fields(stream, source):
            if number == _METADATA_PROPS and _entry(stream, start, end, source)[0] in entries:
                done = end
                continue
            _copy(stream, out, done, end)
            done = end
        for key, value in entries.items():
            entry = b"".join(_delimited(place, text.encode()) for place, text in ((1, key), (2, value)))
            out.write(_delimited(_METADATA_PROPS, entry))


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise ArtefactError(f"{path} doesn't exist: name a folder that holds an exported pipeline")
    return path.open("rb")


def _fields(stream: BinaryIO, path: Path) -> Iterator[tuple[int, int, int]]:
    """Number, first and last byte + 1 of every top-level field, its tag included; there must be a graph."""
    size = os.fstat(stream.fileno()).st_size
    place, graph = 0, False
    while place < size:
        stream.seek(place)
        tag = _varint(stream, path)
        number, kind = tag >> 3, tag & 7
        if kind == 2:
            length = _varint(stream, path)
            end = stream.tell() + length
        elif kind == 0:
            _varint(stream, path)
            end = stream.tell()
        elif kind in (1, 5):
            end = stream.tell() + (8 if kind == 1 else 4)
        else:
            raise _damaged(path)
        if end > size or not number:
            raise _damaged(path)
        graph |= number == _GRAPH
        yield number, place, end
        place = end
    if not graph:
        raise _damaged(path)


def _damaged(path: Path) -> ArtefactError:
    return ArtefactError(f"{path} isn't an ONNX model, or is cut off: export it again")


def _varint(stream: BinaryIO, path: Path) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise _damaged(path)
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _damaged(path)


def _entry(stream: BinaryIO, start: int, end: int, path: Path) -> tuple[str, str]:
    """Key and value of a ``StringStringEntryProto`` field."""
    stream.seek(start)
    _varint(stream, path), _varint(stream, path)
    message = io.BytesIO(stream.read(end - stream.tell()))
    texts = {1: "", 2: ""}
    while message.tell() < len(message.getbuffer()):
        number = _varint(message, path) >> 3
        texts[number] = message.read(_varint(message, path)).decode(errors="replace")
    return texts[1], texts[2]


def _copy(stream: BinaryIO, out: BinaryIO, start: int, end: int) -> None:
    stream.seek(start)
    while start < end:
        block = stream.read(min(_CHUNK, end - start))
        out.write(block)
        start += len(block)


def _delimited(number: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return _encoded(number << 3 | 2) + _encoded(len(value)) + value


def _encoded(value: int) -> bytes:
    """A varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
