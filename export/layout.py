"""How excise lays out a denoiser's ONNX files, so that an edit is one small file.

    unet/model.onnx        the graph, and initialisers of less than 1 KiB
    unet/model.onnx_data   every other initialiser
    unet/edit.onnx_data    the initialisers that an edit can move, each at a multiple of 4096 bytes
    unet/base.safetensors  the unedited values of those, float32, by torch name

Those that an edit can move are the weights that read the text, and what else the edit moves that the folder was
exported with or patched with before; all weights if the export's options say ``editable: all``.
``model.onnx`` then differs between two edits in nothing but the edit's id, and ``model.onnx_data`` not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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


def separate(path: Path, names: Iterable[str], *, keep: bool = False) -> None:
    """Lay out the ONNX file ``path`` anew, with the initialisers of the torch weights ``names`` in a file of their own.

    Values stay as they are, and the files depend on nothing but the graph, the values and ``names``: initialisers are
    in order of their names, whatever files they were in. Those files are replaced, never written to, and removed; where
    each held one tensor, one by one. One initialiser is held at a time beside the graph.

    Args:
        path: As the exporter wrote it (``unshare`` first), or as this function did.
        names: Relative to the denoiser.
        keep: Leave external data as it is but for the initialisers of ``names``, whose old bytes remain in it, unused:
            a model of many gigabytes isn't written again. Initialisers that the graph's file holds stay in it then.

    Raises:
        ArtefactError: A weight isn't in the file, or external data is missing.
    """
    graph = Graph(path)
    located = {graph.locate(name).initializer: name for name in sorted(names)}
    before = {str(place[0]): place for one in _tensors(graph.model.graph) if (place := external_place(one))[0]}
    alone = len(before) == sum(external_place(one)[0] is not None for one in _tensors(graph.model.graph))
    source = _Taken(path, alone and not {EDITED, REST} & before.keys())
    ordered = sorted(graph.model.graph.initializer, key=lambda one: one.name)
    with ExitStack() as stack:
        stream = stack.enter_context(_replacing(path.parent / EDITED))
        for initializer in sorted(located, key=located.__getitem__):
            _put(graph.initializers[initializer], source.data(graph.initializers[initializer]), stream, EDITED)
        if not (keep and before):
            stream = stack.enter_context(_replacing(path.parent / REST))
            external = [one for one in _constants(graph.model.graph) if one.external_data]
            for tensor in [*(one for one in ordered if one.name not in located), *external]:
                if tensor.external_data or len(tensor.raw_data) >= SMALL:
                    _put(tensor, source.data(tensor), stream, REST, inline=SMALL)
    del graph.model.graph.initializer[:]
    graph.model.graph.initializer.extend(ordered)
    save_graph(graph.model, path)
    used = {external_place(one)[0] for one in _tensors(graph.model.graph)}
    for location in {*before, EDITED, REST} - used:
        (path.parent / str(location)).unlink(missing_ok=True)


class _Taken:
    """The bytes of tensors as they were before ``separate``, each read once.

    With ``alone`` every external tensor has a file of its own, which goes when it is read.
    """

    def __init__(self, path: Path, alone: bool) -> None:
        self._path, self._alone = path, alone

    def data(self, tensor: TensorProto) -> bytes:
        """Little-endian, in C order."""
        if not tensor.external_data:
            from onnx import numpy_helper

            values = numpy_helper.to_array(tensor)
            return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
        data = external_values(tensor, self._path).tobytes()
        if self._alone:
            (self._path.parent / str(external_place(tensor)[0])).unlink()
        return data


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` at the end, never written through its links; none if it is empty."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("xb") as stream:
            yield stream
        if partial.stat().st_size:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
            _put(tensor, data, stream, REST, inline=SMALL)
            if alone:
                file.unlink()
    save_graph(graph, path)
    for file in files:
        file.unlink(missing_ok=True)


def _tensors(graph: Any) -> Iterator[TensorProto]:
    """Every tensor of a graph: initialisers, and constants in its nodes and in their subgraphs."""
    yield from graph.initializer
    yield from _constants(graph)


def _constants(graph: Any) -> Iterator[TensorProto]:
    """Every tensor of a graph but its own initialisers."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _put(tensor: TensorProto, data: bytes, stream: BinaryIO, location: str, *, inline: int = 0) -> None:
    """Move a tensor's bytes to external data, or to the tensor itself where they are fewer than ``inline``."""
    if len(data) >= inline:
        _place(tensor, data, stream, location)
        return
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = data


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
