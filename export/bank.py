"""A bank of edits in one ONNX denoiser: every request of a batch chooses its own.

An edit whose layers share one transform is a multiplication of the text, ``W_i (T c) = (W_i T) c``, so the weights stay
the base's and the text is multiplied before anything reads it:

    edit_index (batch) ── Max ── Min ── Gather ── (T − I)ᵀ
                                                     │
    encoder_hidden_states (batch, tokens, d) ─┬─ MatMul ── Add ── Where ── every reader
                                              └────────────┘

``edit_transforms`` holds ``(T − I)ᵀ`` of every row, with shape (k, d, d), in float32 also in a float16 model.

An index outside 0 … k − 1 makes its own row of the batch NaN, and nothing else. ``Gather`` alone would take −1 for the
last edit, and what it does beyond the end is each runtime's own (ONNX Runtime's CPU fails the whole batch). NaN is the
same everywhere, spoils no other request, and never shows the base or another edit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from excise.editfile import Edit
from excise.errors import ArtefactError, UsageError
from excise.export.changed_copy import write_changed
from excise.export.onnx_graph import Graph
from excise.export.text_inputs import TextInput, check_base, short, text_inputs
from excise.export.text_product import Nodes, check_opset, multiplied, read_instead
from excise.onnx_metadata import BANK, EDIT_INDEX
from excise.output import check_free

if TYPE_CHECKING:
    from onnx import ModelProto

EDIT_TRANSFORMS: Final = "edit_transforms"

Changes = dict[TextInput, NDArray[np.float32]]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BankRow(_Frozen):
    """One choice of ``edit_index``.

    Attributes:
        id: Of the edit; None for the base.
        summary: The edit on one line.
    """

    id: str | None
    summary: str


class BankDescription(_Frozen):
    """What a bank holds, for the manifest.

    Attributes:
        rows: In the order of ``edit_index``.
        inputs: Width of each graph input that is multiplied.
        base_compared: Whether the model's weights were compared with those that the edits were made for; those of a
            float16 model are rounded and can't be.
    """

    rows: tuple[BankRow, ...]
    inputs: dict[str, int]
    base_compared: bool

    @property
    def ids(self) -> tuple[str | None, ...]:
        """The edits' ids by index, None for the base: the value of ``excise.bank`` in the file's metadata."""
        return tuple(row.id for row in self.rows)


def add_bank(
    model: Path,
    out: Path,
    edits: Sequence[Edit],
    *,
    with_base: bool = False,
    link: bool = True,
    progress: Callable[[str], None] | None = None,
) -> BankDescription:
    """Write the ONNX denoiser ``model`` to ``out`` with one more input, ``edit_index``: int64 with shape (batch).

    Everything else of the graph stays as it is; external data isn't rewritten (``changed_copy``). Where a batch holds
    the same request twice, as guidance does, its index is given twice.

    Args:
        model: An exported denoiser that carries none of ``edits``, e.g. ``unet/model.onnx``.
        out: A new file.
        edits: In the order of their indices.
        with_base: Index 0 is the unedited model, and the edits follow; without it the base can't be reached.
        link: External data beside ``out`` is hard links; otherwise copies, which the onnx package reads as well.
        progress: Told each step, one line at a time.

    Raises:
        UsageError: No edits, or one of them twice.
        EditError: An edit isn't one transform of the text (FingerprintMismatch: it was made for other weights).
        ArtefactError: ``model`` can't be read, holds a bank already, or has an operator set older than 13.
        NumericsError: A transform isn't finite in float32, or changes nothing.
        OutputError: ``out`` exists already or can't be written.
        MissingExtra: onnx isn't installed.
    """
    say = progress or (lambda message: None)
    check_free(out)
    _check_edits(edits)
    say(f"reading {model}")
    graph = Graph(model)
    _check_plain(graph)
    say("comparing the edits with the model's weights")
    compared = check_base(graph, edits)
    changes = [text_inputs(graph, edit) for edit in edits]
    rows = [BankRow(id=edit.id, summary=edit.summary) for edit in edits]
    if with_base:
        changes.insert(0, {})
        rows.insert(0, BankRow(id=None, summary="the base"))
    inputs = tuple(dict.fromkeys(text for change in changes for text in change))
    description = BankDescription(
        rows=tuple(rows), inputs={text.name: text.dim for text in inputs}, base_compared=compared
    )
    _insert(graph.model, inputs, changes)
    graph.model.metadata_props.add(key=BANK, value=json.dumps(description.ids))
    say(f"writing {out}")
    write_changed(graph.model, model, out, link=link)
    return description


def _check_edits(edits: Sequence[Edit]) -> None:
    if not edits:
        raise UsageError("a bank of no edits: give one or more")
    ids = [edit.id for edit in edits]
    for edit in edits:
        if ids.count(edit.id) > 1:
            raise UsageError(f"{short(edit)} is given {ids.count(edit.id)} times: give each edit once")


def _check_plain(graph: Graph) -> None:
    check_opset(graph.model, graph.path)
    if any(value.name == EDIT_INDEX for value in graph.model.graph.input):
        raise ArtefactError(f"{graph.path} holds a bank already: start from the export that it was made from")


def _insert(model: ModelProto, inputs: Sequence[TextInput], changes: Sequence[Changes]) -> None:
    """Put the product between every text input and its readers."""
    from onnx import TensorProto, helper

    nodes = Nodes("/excise")
    first, last = (
        nodes.constant(f"/excise/{name}", np.array(value, np.int64))
        for name, value in (("first", 0), ("last", len(changes) - 1))
    )
    row = nodes.add("Min", nodes.add("Max", EDIT_INDEX, first), last)
    shape = nodes.constant("/excise/shape", np.array([-1, 1, 1], np.int64))
    valid = nodes.add("Reshape", nodes.add("Equal", row, EDIT_INDEX), shape)
    for text in inputs:
        several = f".{text.name}" if len(inputs) > 1 else ""
        still = np.zeros((text.dim, text.dim), np.float32)
        table = nodes.constant(EDIT_TRANSFORMS + several, np.stack([change.get(text, still).T for change in changes]))
        part = Nodes(f"/excise/{text.name}")
        chosen = part.add("Gather", table, row, axis=0)
        half, vector = text.elem_type == TensorProto.FLOAT16, text.rank == 2
        product = multiplied(part, text.name, chosen, valid=valid, half=half, vector=vector)
        read_instead(model, text.name, product)
        nodes.include(part)
    index = helper.make_tensor_value_info(EDIT_INDEX, TensorProto.INT64, [inputs[0].batch])
    model.graph.input.append(index)
    nodes.put_first(model)
