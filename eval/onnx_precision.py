"""Number formats of an ONNX file, read without the onnx package and without the weights' bytes.

A ``ModelProto`` has its ``GraphProto`` in field 7. That has its initialisers in field 5, each a ``TensorProto`` with
``dims`` (1, one or many, packed or not) and ``data_type`` (2), and its inputs and outputs in fields 11 and 12, each a
``ValueInfoProto`` with a ``TypeProto`` (2), of which ``tensor_type`` (1) has ``elem_type`` (1). Everything else is
skipped by its length. Source: onnx.proto.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from excise.errors import ArtefactError
from excise.protobuf import Span, fields, varint

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
            graphs = [span for span in fields(stream, 0, path.stat().st_size) if span.number == _GRAPH]
            for graph in graphs:
                for span in _inner(stream, graph):
                    if span.number == _INITIALIZER:
                        name, count = _tensor(stream, span)
                        elements[name] += count
                    elif span.number in (_INPUT, _OUTPUT):
                        declared.append(_declared(stream, span))
    except (OSError, EOFError) as error:
        raise ArtefactError(f"{path} can't be read as an ONNX model: export it again") from error
    if not graphs:
        raise ArtefactError(f"{path} isn't an ONNX model: it has no graph")
    return Formats(dict(elements.most_common()), tuple(dict.fromkeys(declared)))


def _declared(stream: BinaryIO, value: Span) -> str:
    """Format of an input or output."""
    spans = [value]
    for wanted in (_TYPE, _TENSOR_TYPE):
        spans = [span for outer in spans for span in _inner(stream, outer) if span.number == wanted]
    for outer in spans:
        for span in _inner(stream, outer):
            if span.number == _ELEM_TYPE:
                stream.seek(span.value)
                return _name(varint(stream))
    return "no tensor"


def _inner(stream: BinaryIO, span: Span) -> Iterator[Span]:
    """The fields of the message in a field."""
    return fields(stream, span.value, span.end)


def _name(kind: int) -> str:
    return FORMATS.get(kind, f"type {kind}")


def _tensor(stream: BinaryIO, tensor: Span) -> tuple[str, int]:
    """Format and number of elements of a ``TensorProto``."""
    dims, kind = [], 0
    for span in _inner(stream, tensor):
        if span.number not in (_DIMS, _DATA_TYPE):
            continue
        stream.seek(span.value)
        values = []
        while stream.tell() < span.end:
            values.append(varint(stream))
        if span.number == _DIMS:
            dims += values
        else:
            kind = values[-1]
    return _name(kind), math.prod(dims)
