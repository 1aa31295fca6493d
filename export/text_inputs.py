"""Which graph input of an exported denoiser an edit could be applied to, in place of its weights.

A transform shared by every layer that reads a text, ``W_i ← W_i T``, is the same on the text itself:
``(W_i T) c = W_i (T c)``. That holds only where *all* of the layers that read the graph input are moved by the *one*
transform; the graph decides, not the edit's word for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from excise.editfile import Edit
from excise.editmetadata import Stream
from excise.errors import ArtefactError, EditError, FingerprintMismatch, NumericsError
from excise.export.layout import BASE
from excise.export.onnx_graph import Graph, equal
from excise.export.pipeline import first_line
from excise.onnx_metadata import EDIT_ID

if TYPE_CHECKING:
    from onnx import NodeProto, ValueInfoProto

BAKE = "bake it into the weights instead, with excise export --edit"
_COPIES = ("Identity", "Cast")


@dataclass(frozen=True)
class TextInput:
    """A graph input that carries text.

    Attributes:
        name: Of the graph input, e.g. ``encoder_hidden_states``.
        dim: Width of the text, d.
        rank: 3 for tokens (batch, tokens, d), 2 for one vector a prompt (batch, d).
        elem_type: ONNX's number of its type; float32 or float16.
        batch: Its first dimension, for other inputs that share it.
    """

    name: str
    dim: int
    rank: int
    elem_type: int
    batch: Any


def short(edit: Edit) -> str:
    """The edit in a message."""
    return f"edit {edit.id[:12]}"


def text_inputs(graph: Graph, edit: Edit) -> dict[TextInput, NDArray[np.float32]]:
    """The inputs that ``edit`` could be applied to, and ``T − I`` (d × d) of each.

    Raises:
        EditError: The edit isn't one transform over exactly the layers that read each input.
        ArtefactError: A layer isn't in the graph, or the graph has control flow, in which a reader could hide.
        NumericsError: ``T − I`` isn't finite in float32, or is zero.
    """
    if edit.metadata.deltas:
        raise EditError(
            f"{short(edit)} moves {len(edit.metadata.deltas)} weights by deltas, not by a transform of the text: {BAKE}"
        )
    if not edit.metadata.streams:
        raise EditError(f"{short(edit)} has no stream of text: there is nothing to multiply")
    if any(
        attribute.HasField("g") or attribute.graphs for node in graph.model.graph.node for attribute in node.attribute
    ):
        raise ArtefactError(f"{graph.path} has control flow, where text could be read unseen: {BAKE}")
    found: dict[TextInput, NDArray[np.float32]] = {}
    for stream in edit.metadata.streams:
        if not edit.is_shared(stream):
            raise EditError(
                f"{short(edit)} has a matrix for each layer (technique tensor), not one for the text: {BAKE}"
            )
        read = _read_by(graph, edit, stream)
        if read in found:
            raise EditError(f"{short(edit)} has several transforms for {read.name}: {BAKE}")
        found[read] = _change(edit, stream)
    if not any(change.any() for change in found.values()):
        raise NumericsError(f"{short(edit)} changes nothing in float32: the base would pass for it")
    return found


def _read_by(graph: Graph, edit: Edit, stream: Stream) -> TextInput:
    """The one input that all layers of ``stream`` read, and nothing else does."""
    declared = {value.name: value for value in graph.model.graph.input}
    # By their outputs, which are unique: a node needn't have a name.
    layers = {(node := graph.nodes[graph.locate(site).node]).output[0]: (node.input[0], site) for site in stream.sites}
    sources = {_source(graph, text): site for text, site in layers.values()}
    for source, site in sources.items():
        if source not in declared:
            raise EditError(f"{site} reads {source} in {graph.path}, which isn't an input of the model: {BAKE}")
    if len(sources) > 1:
        raise EditError(
            f"{short(edit)} moves layers that read {' and '.join(sorted(sources))} by one transform: {BAKE}"
        )
    (name,) = sources
    if others := sorted(node.name for node in _values_read(graph, name) if node.output[0] not in layers):
        raise EditError(
            f"{short(edit)} leaves {others[0]} and {len(others) - 1} more as they are, and they read {name} too: {BAKE}"
        )
    return _described(graph, declared[name], stream)


def _described(graph: Graph, value: ValueInfoProto, stream: Stream) -> TextInput:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    sizes = [dim.dim_value or None for dim in tensor.shape.dim]
    if len(sizes) not in (2, 3) or sizes[-1] not in (None, stream.dim):
        raise FingerprintMismatch(
            f"the edit is for another model: {value.name} of {graph.path} has shape {sizes}, the edit is "
            f"{stream.dim} wide"
        )
    if tensor.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ArtefactError(f"{value.name} of {graph.path} is {kind}: export the model in float32 or float16")
    batch = tensor.shape.dim[0]
    return TextInput(value.name, stream.dim, len(sizes), tensor.elem_type, batch.dim_param or batch.dim_value or None)


def _source(graph: Graph, name: str) -> str:
    """What ``name`` is a copy of, in whatever precision."""
    while (node := graph.producers.get(name)) is not None and node.op_type in _COPIES:
        name = node.input[0]
    return name


def _values_read(graph: Graph, name: str) -> Iterator[NodeProto]:
    """The nodes that read the values of ``name``, or of a copy; asking for its shape isn't reading."""
    for node in graph.model.graph.node:
        if name not in node.input:
            continue
        if node.op_type in _COPIES:
            yield from _values_read(graph, node.output[0])
        elif node.op_type != "Shape":
            yield node


def _change(edit: Edit, stream: Stream) -> NDArray[np.float32]:
    change = edit.matrix(stream.sites[0]) - np.eye(stream.dim)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = change.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise NumericsError(f"{short(edit)} isn't finite in float32: use a larger --regularization")
    return narrow


def check_base(graph: Graph, edits: Sequence[Edit]) -> bool:
    """Refuse edits that were made for other weights than the graph holds.

    Returns:
        Whether the weights themselves were compared: those of a float16 model are rounded, and can be only where the
        export kept the unrounded ones beside it. Elsewhere their shapes are, and the edit that the model carries.

    Raises:
        FingerprintMismatch: An edit is for another model than the first edit, or than the graph.
        ArtefactError: A weight isn't in the graph, or can't be read.
    """
    first = edits[0]
    for edit in edits[1:]:
        if edit.metadata.weights_fingerprint != first.metadata.weights_fingerprint or set(edit.sites) != set(
            first.sites
        ):
            raise FingerprintMismatch(
                f"{short(edit)} and {short(first)} were made for different models or layers: make both for one"
            )
    weights = {site: _weight(graph, site) for site in first.sites}
    exact = all(weight.dtype == np.float32 for weight in weights.values())
    if not exact and (kept := _unrounded(graph, weights)) is not None:
        weights, exact = kept, True
    for edit in edits:
        edit.check(weights, force=edit is not first or not exact)
    carried = next((entry.value for entry in graph.model.metadata_props if entry.key == EDIT_ID), None)
    if not exact and carried is not None and carried not in first.metadata.on:
        raise FingerprintMismatch(
            f"{graph.path} carries edit {carried[:12]} already, and {short(first)} wasn't made for that: "
            "start from the unedited export"
        )
    return exact


def _weight(graph: Graph, site: str) -> NDArray[Any]:
    """A site's weight with shape (o, d)."""
    place = graph.locate(site)
    values = graph.values(place.initializer)
    return values.T if place.transposed else values


def _unrounded(graph: Graph, weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]] | None:
    """The unedited weights that the export kept beside the graph; None where it didn't, or where the graph's differ."""
    path = graph.path.parent / BASE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            kept = {site: file.get_tensor(site) for site in weights}
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} can't be read ({first_line(error)}): export the model again") from error
    return kept if all(equal(values, kept[site]) for site, values in weights.items()) else None
