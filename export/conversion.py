"""A folder that plain Optimum wrote, in excise's layout and with a manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from excise.editfile import Edit
from excise.errors import ArtefactError
from excise.export.layout import BASE, MODEL, separate, write_base
from excise.export.onnx_graph import Graph
from excise.export.weight_map import map_weights, unshare
from excise.manifest import BaseEntry, Manifest, write_manifest

KIND = "onnx-pipeline"
_SITE = re.compile(r".+\.attn2\.to_[kv]|context_embedder|time_text_embed\.text_embedder\.linear_1")


def convert(folder: Path, name: str, edit: Edit, progress: Callable[[str], None]) -> Manifest:
    """Bring an export without a manifest into excise's layout, in place; its weights are taken for the unedited ones.

    Files are replaced, never written to, so that their other hard links stay as they are.

    Args:
        folder: The export.
        name: What the manifest calls the model.
        edit: Every weight that it moves is mapped, beside those that closed forms edit.
        progress: Told each step.

    Raises:
        ArtefactError: It isn't an exported pipeline, a weight of the edit isn't found in it, or ONNX Runtime fused it.
        MissingExtra: onnx isn't installed.
    """
    file = f"{edit.metadata.component}/{MODEL}"
    path = folder / file
    progress(f"converting {file}: it has no excise.json")
    if not path.is_file():
        raise ArtefactError(f"{folder} has no {file}: name a folder that excise export or Optimum wrote")
    graph = Graph(path)
    refuse_fused(graph)
    sites = sorted({f"{module}.weight" for module in graph.modules if _SITE.fullmatch(module)} | set(edit.sites))
    del graph
    unshare(path, sites)
    separate(path, sites)
    graph = Graph(path)
    weights = {}
    for site in sites:
        place = graph.locate(site)
        values = graph.values(place.initializer).astype(np.float32)
        weights[site] = values.T if place.transposed else values
    base_weights = f"{edit.metadata.component}/{BASE}"
    write_base(folder / base_weights, weights)
    progress("hashing")
    return write_manifest(
        folder,
        kind=KIND,
        base=BaseEntry(name=name, pipeline=_pipeline(folder)),
        weights=map_weights(path, weights, file=file),
        base_weights=base_weights,
        tools={},
    )


def refuse_fused(graph: Graph) -> None:
    """Raise ``ArtefactError`` for a graph that ONNX Runtime's optimiser fused: it packs K and V and drops the names."""
    fused = sorted({node.op_type for node in graph.nodes.values() if node.domain == "com.microsoft"})
    if fused:
        raise ArtefactError(
            f"{graph.path} was fused by ONNX Runtime ({', '.join(fused[:3])}), which merges weights and drops their "
            "names: patch the export first, fuse it after"
        )


def _pipeline(folder: Path) -> str:
    """The pipeline's class by ``model_index.json``."""
    try:
        return str(json.loads((folder / "model_index.json").read_bytes())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder} has no readable model_index.json: it isn't an exported pipeline") from error
