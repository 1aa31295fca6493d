"""How excise lays out a denoiser's ONNX files, so that an edit is one small file.

    unet/model.onnx        the graph, and initialisers of less than 1 KiB
    unet/model.onnx_data   every other initialiser
    unet/edit.onnx_data    the initialisers that an edit can move, each at a multiple of 4096 bytes
    unet/base.safetensors  the unedited values of those, float32, by torch name

``model.onnx`` then differs between two edits in nothing but the edit's id, and ``model.onnx_data`` not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from excise.errors import ArtefactError
from excise.export.onnx_graph import Graph, external_place, external_values, save_graph

if TYPE_CHECKING:
    from onnx import TensorProto

MODEL, REST, EDITED, BASE = "model.onnx", "model.onnx_data", "edit.onnx_data", "base.safetensors"
SMALL = 1024
_PAGE = 4096


def separate(path: Path, names: Iterable[str]) -> None:
    """Lay out the ONNX file ``path`` anew, with the initialisers of the torch weights ``names`` in a file of their own.

    Values stay as they are. External data that is there already isn't written to: where one of ``names`` was in it, its
    bytes remain, unused, and initialisers that the graph's file holds stay in it. One initialiser is held at a time
    beside the graph.

    Raises:
        ArtefactError: A weight isn't in the file, or is read by another node too, or external data is missing.
    """
    graph = Graph(path)
    located = {graph.locate(name).initializer: name for name in sorted(names)}
    chosen = sorted(located, key=located.__getitem__)
    with (path.parent / EDITED).open("xb") as stream:
        for initializer in chosen:
            _move(graph.initializers[initializer], graph.values(initializer), stream, EDITED)
    embedded = [
        tensor
        for name, tensor in graph.initializers.items()
        if name not in located and not tensor.external_data and len(tensor.raw_data) >= SMALL
    ]
    if embedded and not (path.parent / REST).exists():
        with (path.parent / REST).open("xb") as stream:
            for tensor in embedded:
                _move(tensor, graph.values(tensor.name), stream, REST)
    save_graph(graph.model, path)


def gather(path: Path) -> None:
    """Put the external data of the ONNX file ``path`` into one file, ``model.onnx_data``.

    PyTorch writes a model of over 2 GB with a file for each of its tensors. They are copied and removed one by one, so
    that neither memory nor disk has to hold the model a second time; tensors of less than 1 KiB go into the graph's
    file. An ONNX file without external data, or with all of it in place, is left alone.

    Raises:
        ArtefactError: External data is missing or too short.
    """
    from onnx import load

    graph = load(str(path), load_external_data=False)
    scattered = [one for one in _tensors(graph.graph) if external_place(one)[0] not in (None, REST)]
    if not scattered:
        return
    files = {path.parent / str(external_place(tensor)[0]) for tensor in scattered}
    alone = len(files) == len(scattered)
    with (path.parent / REST).open("xb") as stream:
        for tensor in scattered:
            data = external_values(tensor, path).tobytes()
            file = path.parent / str(external_place(tensor)[0])
            tensor.ClearField("external_data")
            tensor.data_location = type(tensor).DEFAULT
            if len(data) < SMALL:
                tensor.raw_data = data
            else:
                _place(tensor, data, stream, REST)
            if alone:
                file.unlink()
    save_graph(graph, path)
    for file in files:
        file.unlink(missing_ok=True)


def _tensors(graph: Any) -> Iterator[TensorProto]:
    """Every tensor of a graph: initialisers, and constants in its nodes and in their subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _move(tensor: TensorProto, values: NDArray[Any], stream: BinaryIO, location: str) -> None:
    """Append a tensor's bytes to external data and let it point there."""
    data = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
    _place(tensor, data, stream, location)


def _place(tensor: TensorProto, data: bytes, stream: BinaryIO, location: str) -> None:
    """Append ``data`` to a file of external data and let the tensor point there."""
    from onnx.external_data_helper import set_external_data

    offset = write_aligned(stream, data)
    tensor.ClearField("raw_data")
    for kind in ("float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
        tensor.ClearField(kind)
    tensor.raw_data = b""
    set_external_data(tensor, location, offset=offset, length=len(data))
    tensor.ClearField("raw_data")


def write_aligned(stream: BinaryIO, data: bytes | memoryview) -> int:
    """Append ``data`` at the next multiple of 4096 bytes; its offset."""
    end = stream.seek(0, os.SEEK_END)
    offset = -(-end // _PAGE) * _PAGE
    stream.write(bytes(offset - end))
    stream.write(data)
    return offset


def write_base(path: Path, weights: Mapping[str, NDArray[Any]]) -> None:
    """Write the unedited weights as float32 safetensors.

    Raises:
        ArtefactError: One isn't finite.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in sorted(weights.items())}
    if broken := [name for name, values in arrays.items() if not np.isfinite(values).all()]:
        raise ArtefactError(f"{broken[0]} holds values that aren't finite: the model is damaged")
    save_file(arrays, path, {"format": "pt"})
