"""A folder in another layout than an edit needs, in that: what plain Optimum wrote, or what keeps too few weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.edited_initializers import base_weights
from excise.editfile import Edit
from excise.errors import ArtefactError, FingerprintMismatch
from excise.export.layout import BASE, EDITED, MODEL, REST, separate, write_base
from excise.export.onnx_graph import Graph
from excise.export.weight_map import map_weights, unshare
from excise.manifest import NAME, BaseEntry, Manifest, hash_file, write_manifest

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
    unshare(path)
    separate(path, sites, keep=True)
    weights = _read(Graph(path), sites)
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


def extend(
    folder: Path, manifest: Manifest, edit: Edit, progress: Callable[[str], None], *, force: bool = False
) -> Manifest:
    """Bring what else ``edit`` moves among the weights that lie in ``edit.onnx_data``, in place.

    The denoiser's files are written once more, and replaced, never written to. Those weights have their unedited values
    in the folder, whatever edit it carries.

    Args:
        folder: What ``excise export`` or a patch wrote.
        manifest: Its manifest, with a weight map.
        edit: With weights that the folder keeps no unedited values of.
        progress: Told each step.
        force: Take the edit although it was made for other weights.

    Raises:
        ArtefactError: The folder was altered, was exported with an edit of these weights, or holds one in no
            initialiser of its own.
        FingerprintMismatch: The edit was made for another model, or for the float32 values of what is float16 here.
        MissingExtra: onnx isn't installed.
    """
    (file,) = {entry.file for entry in manifest.weights.values()}
    path = folder / file
    for name in (file, f"{edit.metadata.component}/{REST}"):
        if name in manifest.files and hash_file(folder / name) != manifest.files[name].sha256:
            raise ArtefactError(f"{folder / name} was altered: its SHA-256 isn't the manifest's; export again")
    unshare(path)
    graph = Graph(path)
    with base_weights(folder, manifest) as stored:
        unedited = dict(stored)
    beyond = [site for site in edit.sites if site not in unedited]
    if manifest.edit is not None and (baked := sorted({*manifest.edit.sites} & {*beyond})):
        raise ArtefactError(
            f"{folder} was exported with an edit that also moved {baked[0]}, whose unedited values weren't kept: "
            "export the base model, and patch that"
        )
    if absent := [site for site in beyond if site.rpartition(".")[0] not in graph.modules]:
        raise FingerprintMismatch(f"the edit is for another model: {folder} has no {absent[0]}")
    halves = [site for site in beyond if graph.values(graph.locate(site).initializer).dtype == np.float16]
    unedited |= _read(graph, beyond)
    try:
        edit.check(unedited, force=force)
    except FingerprintMismatch as mismatch:
        if not halves or "fingerprint" not in str(mismatch):
            raise
        raise FingerprintMismatch(
            f"{folder} holds {halves[0]} in float16 alone, and the edit was made for float32 values: export the model "
            "with it, or with editable: all in the options file"
        ) from mismatch
    progress(f"{file}: {len(beyond)} more weights, such as {beyond[0]}, to {EDITED}, where edits can move them")
    del graph
    separate(path, unedited)
    base = str(manifest.base_weights)
    for replaced in (base, NAME):
        (folder / replaced).unlink()  # never written through its links
    write_base(folder / base, unedited)
    written = {entry.data for entry in manifest.weights.values()} | {file, base, f"{edit.metadata.component}/{REST}"}
    return write_manifest(
        folder,
        kind=manifest.kind,
        base=manifest.base,
        edit=manifest.edit,
        weights=map_weights(path, _read(Graph(path), unedited), file=file),
        base_weights=base,
        tools=manifest.tools,
        known={name: entry for name, entry in manifest.files.items() if name not in written},
    )


def _read(graph: Graph, names: Mapping[str, Any] | list[str]) -> dict[str, NDArray[np.float32]]:
    """Weights by torch name, in torch's shapes, as they are in the graph."""
    return {name: graph.weight(graph.locate(name)).astype(np.float32) for name in names}


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
