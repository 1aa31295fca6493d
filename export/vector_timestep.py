"""An exported folder whose UNet takes its timestep with shape (1) in place of a scalar, as Triton needs it.

Optimum exports a ``timestep`` without dimensions, and Triton refuses every model with such an input. One Squeeze behind
the input gives every node the scalar that it had, so the outputs stay as they were, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from excise.enginefile import ENGINE
from excise.errors import ArtefactError
from excise.export.layout import MODEL
from excise.export.onnx_graph import Graph, save_graph
from excise.export.text_product import Nodes, check_opset, read_instead
from excise.manifest import NAME, Manifest, hash_file, read_manifest, write_manifest
from excise.output import check_free, hard_linked, new_folder

INPUT: Final = "timestep"
_FILE: Final = f"unet/{MODEL}"
_ENGINE: Final = (f"unet/{ENGINE}", f"unet/{ENGINE}.json")


def vector_timestep_folder(
    folder: Path, out: Path, *, like: Path | None = None, progress: Callable[[str], None] | None = None
) -> Manifest:
    """Write ``folder`` to the new folder ``out`` with a UNet whose ``timestep`` has shape (1).

    The UNet's ONNX file and the manifest are written anew, which keeps the edit, the bank, the map of the weights and
    the parity figures: the new folder is patched like the old one. Every other file of the manifest is a hard link, or
    a copy where links don't work. An engine of the UNet takes a scalar and doesn't come along.

    Args:
        folder: What ``excise export``, ``excise patch``, ``excise bank`` or ``excise fuse`` wrote.
        out: A new folder.
        like: Another export: files that are equal to its own are links to those, wherever ``folder`` lies.
        progress: Told each step, one line at a time.

    Returns:
        The new manifest.

    Raises:
        ArtefactError: ``folder`` has no manifest, lacks a file or its UNet was altered, or the UNet takes no scalar
            timestep.
        OutputError: ``out`` holds something, or can't be written.
        MissingExtra: onnx isn't installed.
    """
    check_free(out)
    manifest = read_manifest(folder)
    # The new manifest will vouch for what is read here.
    if _FILE not in manifest.files or not (folder / _FILE).is_file():
        raise ArtefactError(f"{folder} has no {_FILE}: name a folder that excise export wrote")
    if hash_file(folder / _FILE) != manifest.files[_FILE].sha256:
        raise ArtefactError(f"{folder / _FILE} was altered: its SHA-256 isn't the manifest's; export again")
    # What is linked isn't hashed here; a file that was cut off or replaced shows in its size.
    for path, entry in manifest.files.items():
        if (folder / path).is_file() and (folder / path).stat().st_size != entry.size:
            raise ArtefactError(f"{folder / path} was altered: it isn't as long as the manifest says; export again")
    graph = Graph(folder / _FILE)
    _add_dimension(graph)
    files = {path: entry for path, entry in manifest.files.items() if path not in _ENGINE}
    held = read_manifest(like).files if like is not None else {}
    if progress is not None:
        progress(f"writing {_FILE}, whose {INPUT} has shape (1)")
    with new_folder(out) as partial:
        for path, entry in files.items():
            place = partial / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if path == _FILE:
                save_graph(graph.model, place)
            elif like is not None and held.get(path) == entry and (like / path).is_file():
                _link(like / path, place)
            else:
                _link(folder / path, place)
        weights = {
            name: entry.model_copy(update={"engine_weight": None}) if entry.file == _FILE else entry
            for name, entry in manifest.weights.items()
        }
        return write_manifest(
            partial,
            kind=manifest.kind,
            base=manifest.base,
            edit=manifest.edit,
            bank=manifest.bank,
            weights=weights,
            base_weights=manifest.base_weights,
            parity=manifest.parity,
            tools=manifest.tools,
            known={path: entry for path, entry in files.items() if path != _FILE},
        )


def _add_dimension(graph: Graph) -> None:
    """Give the input its dimension, and every node behind it the scalar."""
    check_opset(graph.model, graph.path)
    value = next((one for one in graph.model.graph.input if one.name == INPUT), None)
    if value is None:
        raise ArtefactError(f"{graph.path} has no input {INPUT}: name a folder with a UNet that excise export wrote")
    shape = value.type.tensor_type.shape
    if shape.dim:
        sizes = [dim.dim_param or dim.dim_value for dim in shape.dim]
        raise ArtefactError(f"{graph.path} takes {INPUT} with shape {sizes}, no scalar: serve {graph.path.parents[1]}")
    nodes = Nodes(f"/excise/{INPUT}")
    axes = nodes.constant(f"/excise/{INPUT}/axes", np.array([0], np.int64))
    read_instead(graph.model, INPUT, nodes.add("Squeeze", INPUT, axes))
    nodes.put_first(graph.model)
    shape.dim.add().dim_value = 1


def _link(source: Path, target: Path) -> None:
    """A hard link to a file, or to what a symbolic link points to; a copy where that can't be."""
    try:
        source = source.resolve(strict=True)
        if not hard_linked(source, target):
            shutil.copy2(source, target)
    except FileNotFoundError as error:
        raise ArtefactError(f"{source} is missing, and {NAME} lists it: export the model again") from error
