"""An edit behind the text encoder: the denoiser's file stays as it was, byte for byte.

``W_i (T c) = (W_i T) c``, so multiplying what the text encoder puts out is the same as editing every layer that reads
it. The pooled output isn't read by Stable Diffusion's UNet and stays as it was, and so does whatever else the text
encoder makes of its last states.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from excise.editfile import Edit
from excise.errors import ArtefactError, EditError, FingerprintMismatch
from excise.export.changed_copy import write_changed
from excise.export.onnx_graph import Graph
from excise.export.text_inputs import BAKE, check_base, short, text_inputs
from excise.export.text_product import Nodes, check_opset, multiplied, read_instead
from excise.onnx_metadata import EDIT_ID
from excise.output import check_free

if TYPE_CHECKING:
    from onnx import ValueInfoProto

STATES: Final = "last_hidden_state"
EDIT_TRANSFORM: Final = "edit_transform"
_READ: Final = "encoder_hidden_states"
_FAMILY: Final = "stable-diffusion"


def fuse_behind_text_encoder(
    text_encoder: Path, out: Path, edit: Edit, *, unet: Path | None = None, link: bool = True
) -> None:
    """Write the ONNX text encoder to ``out`` with ``edit`` multiplied to its ``last_hidden_state``.

    The edit's id goes into the file's metadata (``excise.edit_id``).

    Args:
        text_encoder: As exported, e.g. ``text_encoder/model.onnx``.
        out: A new file.
        edit: One transform over every layer that reads the text.
        unet: The unedited UNet that will read the output; by default ``unet/model.onnx`` beside the text encoder's
            folder. It decides whether the edit can be here, and is only read.
        link: External data beside ``out`` is hard links; otherwise copies, which the onnx package reads as well.

    Raises:
        EditError: The edit isn't one transform of this output (FingerprintMismatch: it was made for other weights).
        ArtefactError: A file can't be read, carries an edit already, or has an operator set older than 13.
        NumericsError: The transform isn't finite in float32, or changes nothing.
        OutputError: ``out`` exists already or can't be written.
        MissingExtra: onnx isn't installed.
    """
    check_free(out)
    _check_family(edit)
    reader = Graph(unet if unet is not None else text_encoder.absolute().parent.parent / "unet" / "model.onnx")
    check_base(reader, [edit])
    changes = {text.name: change for text, change in text_inputs(reader, edit).items()}
    if set(changes) != {_READ}:
        raise EditError(f"{short(edit)} moves what reads {' and '.join(sorted(changes))}, not only {_READ}: {BAKE}")
    graph = Graph(text_encoder)
    states = _states(graph, width=len(changes[_READ]))
    _append(graph, states, changes[_READ].T)
    graph.model.metadata_props.add(key=EDIT_ID, value=edit.id)
    write_changed(graph.model, text_encoder, out, link=link)


def _check_family(edit: Edit) -> None:
    family = edit.metadata.family
    if family == "stable-diffusion-xl":
        raise EditError(
            f"{short(edit)} is for {family}, whose UNet reads two text encoders joined: its transform mixes them and "
            f"can't be behind either; make a bank of one edit, or {BAKE}"
        )
    if family != _FAMILY:
        raise EditError(
            f"{short(edit)} is for {family}, whose text isn't the {STATES} of one text encoder: "
            f"make a bank of one edit, or {BAKE}"
        )


def _states(graph: Graph, width: int) -> ValueInfoProto:
    """The output with the last states, checked to be ``width`` wide and unedited."""
    from onnx import TensorProto

    check_opset(graph.model, graph.path)
    carried = next((entry.value for entry in graph.model.metadata_props if entry.key == EDIT_ID), None)
    if carried is not None:
        raise ArtefactError(f"{graph.path} carries edit {carried[:12]} already: start from the unedited export")
    states = next((value for value in graph.model.graph.output if value.name == STATES), None)
    if states is None or STATES not in graph.producers:
        outputs = ", ".join(value.name for value in graph.model.graph.output)
        raise ArtefactError(f"{graph.path} has no node that puts out {STATES}, only {outputs}: export it again")
    tensor = states.type.tensor_type
    sizes = [dim.dim_value or None for dim in tensor.shape.dim]
    if len(sizes) != 3 or sizes[-1] not in (None, width):
        raise FingerprintMismatch(
            f"the edit is for another model: {STATES} of {graph.path} has shape {sizes}, the edit is {width} wide"
        )
    if tensor.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ArtefactError(f"{STATES} of {graph.path} is {kind}: export the model in float32 or float16")
    return states


def _append(graph: Graph, states: ValueInfoProto, change: NDArray[np.float32]) -> None:
    """Multiply the output last; what the encoder itself makes of it reads the states as they were."""
    from onnx import TensorProto

    before = f"/excise/{STATES}/unedited"
    producer = graph.producers[STATES]
    producer.output[list(producer.output).index(STATES)] = before
    read_instead(graph.model, STATES, before)
    nodes = Nodes(f"/excise/{STATES}")
    table = nodes.constant(EDIT_TRANSFORM, change)
    product = multiplied(nodes, before, table, half=states.type.tensor_type.elem_type == TensorProto.FLOAT16)
    nodes.rename(product, STATES)
    nodes.put_last(graph.model)
