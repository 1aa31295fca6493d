"""What an ONNX file takes and gives, read without the onnx package and without its weights.

Of ``ModelProto`` only the graph (7) is read, and of that ``initializer`` (5, for their names), ``input`` (11) and
``output`` (12). Source: onnx.proto.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from excise.enginefile import TensorEntry
from excise.errors import ArtefactError
from excise.protobuf import Span, fields, varint

_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "str",
    9: "bool",
    10: "float16",
    11: "float64",
}


class Signature(NamedTuple):
    """Inputs and outputs by name, in the graph's order; -1 is a free dimension."""

    inputs: dict[str, TensorEntry]
    outputs: dict[str, TensorEntry]


def read_signature(path: Path) -> Signature:
    """Inputs (but for initialisers) and outputs of an ONNX file.

    Raises:
        ArtefactError: It is missing, cut off or not an ONNX model, or has a tensor of a type that Triton hasn't.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} doesn't exist: name a folder that holds an exported pipeline")
    found: dict[int, dict[str, TensorEntry]] = {11: {}, 12: {}}
    initializers = set()
    with path.open("rb") as stream:
        try:
            graphs = [one for one in fields(stream, 0, os.fstat(stream.fileno()).st_size) if one.number == 7]
            if not graphs:
                raise EOFError
            for span in fields(stream, graphs[-1].value, graphs[-1].end):
                if span.number == 5:
                    initializers |= {_text(stream, part) for part in _inside(stream, span) if part.number == 8}
                elif span.number in found:
                    name, tensor = _value_info(stream, span, path)
                    found[span.number][name] = tensor
        except EOFError as error:
            raise ArtefactError(f"{path} isn't an ONNX model, or is cut off: export it again") from error
    return Signature({name: one for name, one in found[11].items() if name not in initializers}, found[12])


def _value_info(stream: BinaryIO, span: Span, path: Path) -> tuple[str, TensorEntry]:
    """Name, dtype and shape of a ``ValueInfoProto``: its type (2) holds a tensor's (1) element type and shape."""
    name, elem_type = "", 0
    shape: list[int] = []
    for part in _inside(stream, span):
        if part.number == 1:
            name = _text(stream, part)
        elif part.number == 2:
            for tensor in (one for one in _inside(stream, part) if one.number == 1):
                for one in _inside(stream, tensor):
                    if one.number == 1:
                        elem_type = _number(stream, one)
                    elif one.number == 2:
                        shape = [_size(stream, dim) for dim in _inside(stream, one) if dim.number == 1]
    if elem_type not in _DTYPES:
        raise ArtefactError(f"{path}: {name} has ONNX's element type {elem_type}, which Triton hasn't: export it again")
    return name, TensorEntry(dtype=_DTYPES[elem_type], shape=tuple(shape))


def _size(stream: BinaryIO, dim: Span) -> int:
    for part in _inside(stream, dim):
        if part.number == 1:
            return _number(stream, part)
    return -1


def _inside(stream: BinaryIO, span: Span) -> list[Span]:
    return list(fields(stream, span.value, span.end))


def _number(stream: BinaryIO, span: Span) -> int:
    stream.seek(span.value)
    return varint(stream)


def _text(stream: BinaryIO, span: Span) -> str:
    stream.seek(span.value)
    return stream.read(span.end - span.value).decode(errors="replace")
