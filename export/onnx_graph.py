"""An ONNX file as nodes and initialisers by name, without its external data until that is asked for."""

from __future__ import annotations

import ast
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import ArtefactError, MissingExtra

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_SCOPES = "pkg.torch.onnx.name_scopes"
#: Operators of a module's nodes, each with the input that is its weight or bias.
_INPUT = {
    "weight": {"MatMul": 1, "Gemm": 1, "Conv": 1, "LayerNormalization": 1},
    "bias": {"Gemm": 2, "Conv": 2, "LayerNormalization": 2},
}
#: Where there are none of those: a bias is added, and norms that are several nodes multiply by their weight. Either
#: input may hold it.
_ELEMENTWISE = {"weight": "Mul", "bias": "Add"}


def node_prefix(name: str) -> str:
    """Path of the node that a torch weight belongs to: ``a.0.to_k.weight`` → ``/a.0/to_k/``.

    Raises:
        ArtefactError: ``name`` is not a module's weight or bias.
    """
    module, _, kind = name.rpartition(".")
    if not module or kind not in _INPUT:
        raise ArtefactError(f"{name} is not a weight or bias of a module: it can't be found in an ONNX graph")
    path = ""
    for part in module.split("."):
        path += f".{part}" if part.isdigit() else f"/{part}"
    return path + "/"


@dataclass(frozen=True)
class Location:
    """A node, the initialiser that it reads, and how that holds the torch weight.

    Attributes:
        node, initializer: Their names.
        transposed: Whether the initialiser is the weight's transpose.
        vector: Whether the weight is a vector, where the initialiser may have axes of size 1 beside: (c, 1, 1).
    """

    node: str
    initializer: str
    transposed: bool
    vector: bool = False


class Graph:
    """An ONNX file with its nodes and initialisers indexed by name; external data is read when asked for.

    Raises:
        ArtefactError: ``path`` is missing or isn't an ONNX model.
        MissingExtra: onnx isn't installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = load_graph(path)
        graph = self.model.graph
        self.nodes: dict[str, NodeProto] = {node.name: node for node in graph.node}
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.producers: dict[str, NodeProto] = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[str]] = {}
        self._scoped: dict[tuple[str, str], list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node.name)
            if (module := _scope(node)) is not None:
                self._scoped.setdefault((module, node.op_type), []).append(node)

    @property
    def modules(self) -> set[str]:
        """Paths of the torch modules that have a node, in torch's words: ``a.0.to_k``."""
        named = {name.strip("/").rpartition("/")[0].replace("/", ".") for name in self.nodes if name.startswith("/")}
        return named | {module for module, _ in self._scoped}

    def locate(self, name: str) -> Location:
        """The node of torch weight ``name`` and the initialiser that it reads, by path alone.

        Raises:
            ArtefactError: There is no such node, or what it reads isn't an initialiser, or several nodes could be it.
        """
        prefix, kind = node_prefix(name), name.rpartition(".")[2]
        for operator, position in _INPUT[kind].items():
            node = self._node(prefix, operator)
            if node is not None and node.op_type == operator and len(node.input) > position:
                break
        else:
            return self._elementwise(name, prefix, kind)
        source, flips = self._root(node.input[position])
        if source not in self.initializers:
            raise ArtefactError(
                f"{name} is not in {self.path}: input {position} of {node.name} is {source}, not an initialiser"
            )
        # MatMul multiplies by the transpose of a torch Linear's weight; Gemm says for itself.
        stored = operator == "MatMul" or (operator == "Gemm" and position == 1 and not _attribute(node, "transB"))
        return Location(node.name, source, stored != bool(flips % 2))

    def _elementwise(self, name: str, prefix: str, kind: str) -> Location:
        """The one product or sum of a module that reads an initialiser of more than one number.

        Norms have others: of the variance and ε, say.
        """
        operator, number, found = _ELEMENTWISE[kind], 0, []
        while (node := self._node(prefix, operator + (f"_{number}" if number else ""), operator)) is not None:
            for source in {self._root(one)[0] for one in node.input} & self.initializers.keys():
                if math.prod(self.initializers[source].dims) > 1:
                    found.append(Location(node.name, source, transposed=False, vector=True))
            number += 1
        if len(found) > 1:
            raise ArtefactError(
                f"{name} of {self.path} can't be told: {found[0].node} reads {found[0].initializer}, "
                f"and {found[1].node} {found[1].initializer}"
            )
        if not found:
            there = sorted(other for other in self.nodes if other.startswith(prefix))
            only = f"only {', '.join(there[:3])}" if there else "nothing there"
            raise ArtefactError(
                f"{name} is not in {self.path}: no node {prefix}{next(iter(_INPUT[kind]))} and no {prefix}{operator} "
                f"of an initialiser, {only}"
            )
        if len([size for size in self.initializers[found[0].initializer].dims if size != 1]) > 1:
            shape = tuple(self.initializers[found[0].initializer].dims)
            raise ArtefactError(
                f"{name} is not in {self.path}: {found[0].node} reads {found[0].initializer} of shape {shape}, "
                "which isn't a vector"
            )
        return found[0]

    def _node(self, prefix: str, title: str, operator: str | None = None) -> NodeProto | None:
        """The node of a module: by its name, or by the scope that torch's dynamo exporter notes of it.

        ``title`` is the end of its name, which is a number longer than its operator from the second one on.
        """
        if operator is not None and title != operator:
            return self.nodes.get(prefix + title)
        operator = title
        module = prefix.strip("/").replace("/", ".")
        scoped = self._scoped.get((module, operator), [])
        if len(scoped) > 1:
            raise ArtefactError(
                f"{self.path} has {len(scoped)} {operator} nodes of {module} ({scoped[0].name}, {scoped[1].name}, …): "
                "which one holds its weight can't be told"
            )
        return self.nodes.get(prefix + operator) or next(iter(scoped), None)

    def _root(self, name: str) -> tuple[str, int]:
        """What ``name`` is a copy of, through Identity and 2-D Transpose nodes, and the number of transposes."""
        flips = 0
        while name not in self.initializers and (node := self.producers.get(name)) is not None:
            if node.op_type == "Transpose" and list(_attribute(node, "perm") or (1, 0)) == [1, 0]:
                flips += 1
            elif node.op_type != "Identity":
                break
            name = node.input[0]
        return name, flips

    def weight(self, place: Location) -> NDArray[Any]:
        """The values at a place in the torch weight's shape.

        Raises:
            ArtefactError: as ``values``.
        """
        values = self.values(place.initializer)
        return values.reshape(-1) if place.vector else values.T if place.transposed else values

    def values(self, initializer: str) -> NDArray[Any]:
        """An initialiser's values, with external data read from beside the file.

        Raises:
            ArtefactError: The external data is missing or too short.
        """
        tensor = self.initializers[initializer]
        if not tensor.external_data:
            from onnx import numpy_helper

            values: NDArray[Any] = numpy_helper.to_array(tensor)
            return values
        return external_values(tensor, self.path)

    def holding(self, weight: NDArray[Any]) -> list[str]:
        """Names of the initialisers whose values equal ``weight`` or its transpose; for messages only."""
        shapes = {weight.shape, weight.T.shape}
        near = (name for name, tensor in self.initializers.items() if tuple(tensor.dims) in shapes)
        return sorted(name for name in near if equal(self.values(name), weight) or equal(self.values(name), weight.T))


def external_place(tensor: TensorProto) -> tuple[str | None, int]:
    """The external data file of an initialiser, relative to its ONNX file's folder, and its first byte there.

    ``None`` where the ONNX file itself holds it.
    """
    fields = {entry.key: entry.value for entry in tensor.external_data}
    return fields.get("location"), int(fields.get("offset", 0))


def external_values(tensor: TensorProto, path: Path) -> NDArray[Any]:
    """The values of an initialiser that ``path`` keeps in external data.

    The onnx package refuses files with several hard links, which versions of one model are made of.
    """
    from onnx.helper import tensor_dtype_to_np_dtype

    location, offset = external_place(tensor)
    source = path.parent / str(location)
    if path.parent.resolve() not in source.resolve().parents:
        raise ArtefactError(f"{tensor.name} of {path} can't be read: {location} is outside the model's folder")
    dtype, shape = tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<"), tuple(tensor.dims)
    try:
        values = np.fromfile(source, dtype, count=math.prod(shape), offset=offset)
    except OSError as error:
        raise ArtefactError(f"{tensor.name} of {path} can't be read: {source} is missing") from error
    if values.size != math.prod(shape):
        raise ArtefactError(f"{tensor.name} of {path} can't be read: {source} is too short")
    return values.reshape(shape)


def _scope(node: NodeProto) -> str | None:
    """Path of the module that a node belongs to, as torch's dynamo exporter notes it in the node's metadata."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
    if noted is None:
        return None
    try:
        scopes = ast.literal_eval(noted)  # ['', 'a', 'a.0', 'a.0.to_k', 'linear_8']
        return str(scopes[-2])
    except (ValueError, SyntaxError, IndexError, TypeError):
        return None


def _attribute(node: NodeProto, name: str) -> Any:
    """The value of a node's attribute, ``None`` if it isn't set."""
    from onnx import helper

    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), None)


def equal(found: NDArray[Any], weight: NDArray[Any]) -> bool:
    """Whether an initialiser holds ``weight`` exactly, after a cast to the initialiser's type."""
    return found.shape == weight.shape and bool(np.array_equal(found, weight.astype(found.dtype)))


def load_graph(path: Path) -> ModelProto:
    """The ONNX model at ``path``, its external data left on disk.

    Raises:
        ArtefactError: ``path`` is missing or isn't an ONNX model.
        MissingExtra: onnx isn't installed.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtra("onnx", "export") from error
    if not path.is_file():
        raise ArtefactError(f"{path} doesn't exist: name a folder that holds an exported pipeline")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ArtefactError(f"{path} isn't an ONNX model, or is cut off: {str(error).partition(chr(10))[0]}") from error
    if not model.graph.node:
        raise ArtefactError(f"{path} isn't an ONNX model: it has no nodes")
    return model


def save_graph(model: ModelProto, path: Path) -> None:
    """Replace the ONNX file at ``path`` in one step; external data stays where it is and as it is."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(model.SerializeToString())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
