"""Tensors of KServe's protocol, version 2, in JSON and in Triton's binary extension.

A binary request is a JSON object of as many bytes as its header ``Inference-Header-Content-Length`` says, and after it
the tensors that have a ``binary_data_size``, one after the other: numbers little-endian, BYTES as elements of four
bytes of length and the bytes themselves.
Source: KServe, "Open Inference Protocol (V2)"; Triton, "Binary Tensor Data Extension".
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from excise.serve.engine import Image
from excise.serve.http_errors import RequestRefused, quoted, refused_by

#: The inputs, with their data types; the first is the one that must be there.
INPUTS = {
    "PROMPT": "BYTES",
    "NEGATIVE_PROMPT": "BYTES",
    "SEED": "INT64",
    "NUM_INFERENCE_STEPS": "INT32",
    "GUIDANCE_SCALE": "FP32",
    "EDIT": "BYTES",
}
OUTPUT = "IMAGES"

#: Where a binary request's, or answer's, JSON ends.
HEADER_LENGTH = "inference-header-content-length"

_NUMBERS = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4"}
_LARGEST_FP32 = float(np.finfo(np.float32).max)
_BOUNDS = {"INT64": 2**63, "INT32": 2**31}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputTensor(_Part):
    """One input."""

    name: str
    shape: list[int] = Field(min_length=1, max_length=2)
    datatype: str
    parameters: dict[str, JsonValue] = {}
    data: list[JsonValue] | None = None


class OutputWanted(_Part):
    """One output that is asked for."""

    name: str
    parameters: dict[str, JsonValue] = {}


class InferBody(_Part):
    """What ``/infer`` is asked."""

    model_config = ConfigDict(title="InferRequest")

    id: str | None = None
    parameters: dict[str, JsonValue] = {}
    inputs: list[InputTensor] = Field(min_length=1, max_length=len(INPUTS))
    outputs: list[OutputWanted] | None = None

    @property
    def binary(self) -> bool:
        """Whether the images are wanted as bytes after the answer's JSON. Raises ``RequestRefused``."""
        wanted = self.parameters.get("binary_data_output", False)
        for output in self.outputs or ():
            if output.name != OUTPUT:
                raise RequestRefused(f"output {quoted(output.name)!r} isn't there: this model gives {OUTPUT}")
            if unknown := set(output.parameters) - {"binary_data"}:
                raise RequestRefused(f"output parameter {quoted(min(unknown))!r} isn't known here: leave it out")
            wanted = output.parameters.get("binary_data", wanted)
        if not isinstance(wanted, bool):
            raise RequestRefused(f"binary_data={quoted(wanted)}: give true or false")
        return wanted

    @property
    def timeout(self) -> float | None:
        """Triton's parameter ``timeout``, in seconds. Raises ``RequestRefused``."""
        microseconds = self.parameters.get("timeout")
        if microseconds is None or microseconds == 0:
            return None
        if isinstance(microseconds, bool) or not isinstance(microseconds, int) or not 0 < microseconds < 2**63:
            raise RequestRefused(f"timeout={quoted(microseconds)}: give a positive integer, in microseconds")
        return microseconds / 1e6


def read_body(body: bytes, header_length: str | None) -> tuple[InferBody, dict[str, list[Any]]]:
    """A request, and the values of each of its inputs: text, integers or floats, as many in each.

    Raises:
        RequestRefused: It isn't what the protocol, or this model, takes.
    """
    end = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and int(header_length[:20]) <= end):
            raise RequestRefused(f"{HEADER_LENGTH}={quoted(header_length)}: give the length of the JSON, at most {end}")
        end = int(header_length[:20])
    try:
        request = InferBody.model_validate_json(body[:end])
    except ValidationError as error:
        raise refused_by(error) from error
    values: dict[str, list[Any]] = {}
    rest = memoryview(body)[end:]
    for tensor in request.inputs:
        if tensor.name not in INPUTS:
            raise RequestRefused(f"input {quoted(tensor.name)!r} isn't known: this model takes {', '.join(INPUTS)}")
        if tensor.name in values:
            raise RequestRefused(f"input {tensor.name} is there twice")
        values[tensor.name], rest = _values(tensor, rest)
    if len(rest):
        raise RequestRefused(f"{len(rest)} bytes follow the last tensor: give each its binary_data_size")
    if "PROMPT" not in values:
        raise RequestRefused("input PROMPT is missing")
    n = len(values["PROMPT"])
    for name, found in values.items():
        if len(found) != n:
            raise RequestRefused(f"{name} has {len(found)} rows and PROMPT {n}: give each input one row an image")
    return request, values


def answer(body: dict[str, Any], images: list[Image], *, binary: bool) -> tuple[bytes, dict[str, str]]:
    """An answer with the images as its output, and the headers that it needs beside those of HTTP."""
    stacked = np.stack(images)
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "UINT8", "shape": list(stacked.shape)}
    if not binary:
        output["data"] = stacked.ravel().tolist()
        text = json.dumps({**body, "outputs": [output]}, separators=(",", ":")).encode()
        return text, {"content-type": "application/json"}
    output["parameters"] = {"binary_data_size": stacked.size}
    text = json.dumps({**body, "outputs": [output]}, separators=(",", ":")).encode()
    return text + stacked.tobytes(), {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}


def _values(tensor: InputTensor, rest: memoryview) -> tuple[list[Any], memoryview]:
    """A tensor's values, and what follows it of the binary part."""
    name, wanted = tensor.name, INPUTS[tensor.name]
    if tensor.datatype != wanted:
        raise RequestRefused(f"{name} has the data type {quoted(tensor.datatype)}: give {wanted}")
    if tensor.shape[0] < 1 or tensor.shape[1:] not in ([], [1]):
        raise RequestRefused(f"{name} has the shape {quoted(tensor.shape)}: give [n, 1]")
    if unknown := set(tensor.parameters) - {"binary_data_size"}:
        raise RequestRefused(f"{name}: parameter {quoted(min(unknown))!r} isn't known here: leave it out")
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        found = [_json_value(name, wanted, value) for value in _flat(tensor.data or [])]
    else:
        if tensor.data is not None:
            raise RequestRefused(f"{name} has data and a binary_data_size: give one of them")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(rest):
            raise RequestRefused(f"{name}: binary_data_size={quoted(size)}, and {len(rest)} bytes are there")
        found = _binary_values(name, wanted, bytes(rest[:size]))
        rest = rest[size:]
    if len(found) != tensor.shape[0]:
        raise RequestRefused(f"{name} has the shape {tensor.shape} and {len(found)} values")
    return found, rest


def _flat(data: list[JsonValue]) -> list[JsonValue]:
    """Nested or flat data as one list: the last dimension is 1, so that one level is all there can be."""
    return [inner for value in data for inner in (value if isinstance(value, list) else [value])]


def _json_value(name: str, datatype: str, value: JsonValue) -> Any:
    if datatype == "BYTES":
        sound = isinstance(value, str)
    elif datatype == "FP32":
        sound = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_FP32
    else:
        limit = _BOUNDS[datatype]
        sound = isinstance(value, int) and not isinstance(value, bool) and -limit <= value < limit
    if not sound:
        raise RequestRefused(f"{name} holds a value that is no {datatype}: {quoted(value)}")
    return value


def _binary_values(name: str, datatype: str, data: bytes) -> list[Any]:
    if datatype in _NUMBERS:
        kind = np.dtype(_NUMBERS[datatype])
        if len(data) % kind.itemsize:
            raise RequestRefused(f"{name} has {len(data)} bytes, which aren't whole values of {datatype}")
        return list(np.frombuffer(data, kind).tolist())
    texts, start = [], 0
    while start < len(data):
        if start + 4 > len(data):
            raise RequestRefused(f"{name} ends within the length of an element")
        (length,) = struct.unpack_from("<I", data, start)
        start += 4
        if start + length > len(data):
            raise RequestRefused(f"{name} has an element of {length} bytes where {len(data) - start} are left")
        try:
            texts.append(data[start : start + length].decode())
        except UnicodeDecodeError as error:
            raise RequestRefused(f"{name} isn't valid UTF-8") from error
        start += length
    return texts
