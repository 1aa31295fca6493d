"""Number formats of an ONNX file, read without the onnx package and without the weights' bytes.

A ``ModelProto`` has its ``GraphProto`` in field 7. That has its initialisers in field 5, each a ``TensorProto`` with
``dims`` (1, one or many, packed or not) and ``data_type`` (2), and its inputs and outputs in fields 11 and 12, each a
``ValueInfoProto`` with a ``TypeProto`` (2), of which ``tensor_type`` (1) has ``elem_type`` (1). Everything else is
skipped by its length. Source: onnx.proto and the encoding of protocol buffers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from excise.errors import ArtefactError

_GRAPH, _INITIALIZER, _INPUT, _OUTPUT = 7, 5, 11, 12
_DIMS, _DATA_TYPE = 1, 2
_TYPE, _TENSOR_TYPE, _ELEM_TYPE = 2, 1, 1

#: ``TensorProto.DataType`` of the formats that weights have.
FORMATS = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
FORMATS |= {16: "bfloat16", 17: "float8e4m3fn", 19: "float8e5m2", 21: "uint4", 22: "int4"}


@dataclass(frozen=True)
class Formats:
    """What a file's numbers are.

    Attributes:
        initializers: Number of elements in each format, the most frequent first; constants of nodes aren't counted.
        inputs_outputs: Formats of the graph's inputs and outputs, each once, in order.
    """

    initializers: dict[str, int]
    inputs_outputs: tuple[str, ...]


def read_formats(path: Path) -> Formats:
    """The formats of an ONNX file.

    Raises:
        ArtefactError: the file is missing, cut off or not an ONNX model.
    """
    elements: Counter[str] = Counter()
    declared: list[str] = []
    try:
        with path.open("rb") as stream:
            graphs = [span for number, span in _fields(stream, 0, path.stat().st_size) if number == _GRAPH]
            for start, stop in graphs:
                for number, (first, last) in _fields(stream, start, stop):
                    if number == _INITIALIZER:
                        name, count = _tensor(stream, first, last)
                        elements[name] += count
                    elif number in (_INPUT, _OUTPUT):
                        declared.append(_declared(stream, first, last))
    except (OSError, EOFError) as error:
        raise ArtefactError(f"{path} can't be read as an ONNX model: export it again") from error
    if not graphs:
        raise ArtefactError(f"{path} isn't an ONNX model: it has no graph")
    return Formats(dict(elements.most_common()), tuple(dict.fromkeys(declared)))


def _declared(stream: BinaryIO, start: int, end: int) -> str:
    """Format of an input or output."""
    spans = [(start, end)]
    for wanted in (_TYPE, _TENSOR_TYPE):
        spans = [span for outer in spans for number, span in _fields(stream, *outer) if number == wanted]
    for span in spans:
        for number, (first, _) in _fields(stream, *span):
            if number == _ELEM_TYPE:
                stream.seek(first)
                return _name(_varint(stream))
    return "no tensor"


def _name(kind: int) -> str:
    return FORMATS.get(kind, f"type {kind}")


def _tensor(stream: BinaryIO, start: int, end: int) -> tuple[str, int]:
    """Format and number of elements of a ``TensorProto``."""
    dims, kind = [], 0
    for number, (first, last) in _fields(stream, start, end):
        if number not in (_DIMS, _DATA_TYPE):
            continue
        stream.seek(first)
        values = []
        while stream.tell() < last:
            values.append(_varint(stream))
        if number == _DIMS:
            dims += values
        else:
            kind = values[-1]
    return _name(kind), math.prod(dims)


def _fields(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Number, and first and last byte + 1 of the value, of every field of a message."""
    place = start
    while place < end:
        stream.seek(place)
        tag = _varint(stream)
        number, kind = tag >> 3, tag & 7
        first = stream.tell()
        if kind == 2:
            length = _varint(stream)
            first = stream.tell()
            place = first + length
        elif kind == 0:
            _varint(stream)
            place = stream.tell()
        elif kind in (1, 5):
            place = first + (8 if kind == 1 else 4)
        else:
            raise EOFError
        if place > end:
            raise EOFError
        yield number, (first, place)


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise EOFError
