"""From a torch weight of the UNet to its initialiser in ``unet/model.onnx``.

The exporter keeps a module's path in its node's name and anonymises the weight (``onnx::MatMul_1644``), so the node
decides:

    down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight
    → node /down_blocks.0/attentions.0/transformer_blocks.0/attn2/to_k/MatMul → its input 1, transposed (d × o)

The values are then compared exactly. They never decide by themselves: two layers may hold equal weights, and the
exporter then makes both nodes read one initialiser (``unshare`` gives each its own again, under the name that it would
have had). Norms that are several nodes hold their vector as (c, 1, 1).
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from excise.edited_initializers import in_initializer
from excise.errors import ArtefactError
from excise.export.onnx_graph import Graph, Location, equal, external_place, save_graph
from excise.manifest import WeightEntry

if TYPE_CHECKING:
    from onnx import ModelProto


def map_weights(
    path: Path, weights: Mapping[str, NDArray[Any]], *, file: str = "unet/model.onnx"
) -> dict[str, WeightEntry]:
    """Find every weight in the ONNX file and check that it is there with exactly these values.

    Args:
        path: The ONNX file.
        weights: Torch values by name relative to the UNet; a linear weight has shape (o, d).
        file: What the entries call the ONNX file.

    Returns:
        The manifest's weight map.

    Raises:
        ArtefactError: A node is missing, an initialiser holds other values (the message names the one that holds the
            weight, if any), or an initialiser is read by another node too, so that it couldn't be changed alone.
    """
    graph = Graph(path)
    entries: dict[str, WeightEntry] = {}
    for name, weight in weights.items():
        place = graph.locate(name)
        found = graph.values(place.initializer)
        expected = in_initializer(weight, transposed=place.transposed, shape=found.shape)
        if not equal(found, expected):
            raise ArtefactError(_mismatch(graph, name, weight, place, found, expected))
        readers = graph.readers[place.initializer]
        if len(readers) > 1:
            others = ", ".join(sorted(set(readers) - {place.node})) or "itself twice"
            raise ArtefactError(
                f"{name} can't be changed alone in {path}: {place.initializer} is read by {place.node} and by {others}"
            )
        data, offset = external_place(graph.initializers[place.initializer])
        entries[name] = WeightEntry(
            file=file,
            node=place.node,
            initializer=place.initializer,
            transposed=place.transposed,
            dtype=str(found.dtype),
            shape=found.shape,
            sha256=array_sha256(found),
            data=None if data is None else (PurePosixPath(file).parent / data).as_posix(),
            offset=offset,
        )
    return entries


def _mismatch(
    graph: Graph, name: str, weight: NDArray[Any], place: Location, found: NDArray[Any], expected: NDArray[Any]
) -> str:
    """What is wrong with the initialiser that ``name``'s node reads."""
    if found.shape != expected.shape:
        what = f"has shape {found.shape}, not {expected.shape}"
    else:
        worst = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
        what = f"holds other values (largest difference {worst:.3g})"
    elsewhere = [other for other in graph.holding(weight) if other != place.initializer]
    hint = f"; {elsewhere[0]} holds these" if elsewhere else ""
    return f"{name} is not in {graph.path}: {place.node} reads {place.initializer}, which {what}{hint}"


def array_sha256(values: NDArray[Any]) -> str:
    """SHA-256 of an array's bytes in C order, little-endian: the bytes that ONNX stores."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()).hexdigest()


def unshare(path: Path) -> int:
    """Give every node that reads an initialiser through an Identity one of its own.

    The exporter merges equal initialisers, as are most norms' before training; changing one weight would then change
    another. Copies get the Identity's output name, which is the name that the initialiser has when no two are equal.
    Nodes outside any module, which the exporter numbers through with the Identities (``Constant_559``), are numbered
    anew: afterwards the graph doesn't depend on the weights' values. External data isn't copied: both point to the
    same bytes, until ``separate`` writes them.

    Returns:
        How many initialisers were added; the file is written only if something changes.
    """
    graph = Graph(path)
    outputs = {value.name for value in graph.model.graph.output}
    copies = [
        node
        for node in graph.model.graph.node
        if node.op_type == "Identity" and node.input[0] in graph.initializers and node.output[0] not in outputs
    ]
    for node in copies:
        tensor = copy.deepcopy(graph.initializers[node.input[0]])
        tensor.name = node.output[0]
        graph.model.graph.initializer.append(tensor)
        graph.model.graph.node.remove(node)
    if _number(graph.model) or copies:
        save_graph(graph.model, path)
    return len(copies)


def _number(model: ModelProto) -> bool:
    """Number the nodes outside any module from 0 within each operator; whether that changed a name."""
    numbers: Counter[str] = Counter()
    changed = False
    for node in model.graph.node:
        if not re.fullmatch(rf"{node.op_type}_\d+", node.name):
            continue
        name = f"{node.op_type}_{numbers[node.op_type]}"
        numbers[node.op_type] += 1
        if node.name != name:
            node.name, changed = name, True
    return changed
