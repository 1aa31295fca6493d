"""The nodes that multiply a text by a transform: ``c ← c + c (T − I)ᵀ``, in float32 whatever the model's precision.

The change ``T − I`` is stored, not ``T``: it is small where the edit leaves the text alone, and exactly zero for the
identity. In a float16 model, keys and values then err by 0.9 to 1.1 times what those of float16 weights with the
edit in them do; with the product in float16 it was 0.9 to 1.3 times (four edits of the demo and a tiny model).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import ArtefactError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_OPSET = 13


class Nodes:
    """Nodes and constants under one path, added to a model when they are whole."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, operator: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node ``path/name`` and return its output's name."""
        from onnx import helper

        place = f"{self.path}/{name or operator}"
        output = f"{place}_output_0"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=place, **attributes))
        return output

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add an initialiser under its full name."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def rename(self, output: str, name: str) -> None:
        """Give the last node's output, ``output``, another name."""
        self.nodes[-1].output[list(self.nodes[-1].output).index(output)] = name

    def include(self, other: Nodes) -> None:
        """Take over the nodes and constants of ``other``."""
        self.nodes += other.nodes
        self.constants += other.constants

    def put_first(self, model: ModelProto) -> None:
        """Add them to ``model`` before its own nodes: what they read are its inputs."""
        own = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*self.nodes, *own])
        model.graph.initializer.extend(self.constants)

    def put_last(self, model: ModelProto) -> None:
        """Add them to ``model`` after its own nodes."""
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.constants)


def multiplied(
    nodes: Nodes, text: str, change: str, *, valid: str | None = None, half: bool, vector: bool = False
) -> str:
    """``text + text change``, with ``change`` already transposed.

    Args:
        nodes: Where the nodes go.
        text: A tensor with shape (batch, tokens, d), or (batch, d) for a ``vector``.
        change: ``(T − I)ᵀ`` in float32 with shape (d, d) or (batch, d, d).
        valid: Booleans with shape (batch, 1, 1): rows where it is false become NaN.
        half: Whether the text is float16.
        vector: Whether the text has no axis of tokens.

    Returns:
        The product's name; it has the shape and type of ``text``.
    """
    from onnx import TensorProto

    if half:
        text = nodes.add("Cast", text, name="CastToFloat", to=TensorProto.FLOAT)
    if vector:
        axes = nodes.constant(f"{nodes.path}/axes", np.array([1], np.int64))
        text = nodes.add("Unsqueeze", text, axes)
    text = nodes.add("Add", text, nodes.add("MatMul", text, change))
    if valid is not None:
        text = nodes.add("Where", valid, text, nodes.constant(f"{nodes.path}/nan", np.array(np.nan, np.float32)))
    if vector:
        text = nodes.add("Squeeze", text, axes)
    return nodes.add("Cast", text, name="CastToHalf", to=TensorProto.FLOAT16) if half else text


def check_opset(model: ModelProto, path: Any) -> None:
    """Raise ``ArtefactError`` for an operator set older than 13, whose ``Unsqueeze`` and ``Min`` are other ones."""
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if opset < _OPSET:
        raise ArtefactError(f"{path} has operator set {opset}: export it with {_OPSET} or later")


def read_instead(model: ModelProto, old: str, new: str) -> None:
    """Make every node that reads ``old`` read ``new``."""
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new
