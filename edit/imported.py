"""A third party's edited denoiser as an edit against a given base."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import excise
from excise.edit.apply import carried
from excise.edit.checkpoint import read_checkpoint
from excise.edit.component_files import Float32, Tensors, read_json
from excise.edit.families import Family, family_of
from excise.edit.model_folder import denoiser_weights
from excise.edit.stream_arrays import stream_arrays
from excise.edit.third_party import Moved, compare
from excise.edit.transform import Step, Transform
from excise.editfile import Array, Edit, fingerprint
from excise.editmetadata import EditMetadata, Erased, Kept, Stream
from excise.errors import EditError


def imported(checkpoint: Path, folder: Path, *, erased: tuple[str, ...] = ()) -> tuple[Edit, list[str]]:
    """The edit that makes the checkpoint of the model in ``folder``, and a report of what it moves.

    Where all layers that read the text moved by one right-multiplication, that is the edit's transform; everything else
    is kept as differences.

    Args:
        checkpoint: as ``checkpoint.read_checkpoint`` reads it.
        folder: a diffusers folder, the checkpoint's base.
        erased: what the checkpoint is said to have erased; nothing in it tells.

    Raises:
        EditError: a checkpoint that can't be read, of another model, or that changes nothing.
        ModelError: the base is missing, incomplete or of an unknown family.
    """
    family = family_of(folder)
    base = denoiser_weights(folder)
    name, moved = _compared(checkpoint, folder, family, base)
    tensors: dict[str, Array] = {f"delta.{name}": delta.numpy() for name, delta in moved.deltas.items()}
    streams: tuple[Stream, ...] = ()
    if moved.shared is not None:
        shared = Transform((Step.of(moved.shared),), len(moved.shared))
        tensors |= stream_arrays(shared, name, tolerance=1e-9)
        streams = (Stream(name=name, dim=len(moved.shared), sites=moved.sites),)
    source: dict[str, Any] = {"file": checkpoint.name, "sha256": _sha256(checkpoint), **moved.document}
    metadata = EditMetadata(
        excise_version=excise.__version__,
        method="imported",
        recipe={},
        concepts=tuple(Erased(erase=concept, to="") for concept in erased),
        kept=Kept.of(()),
        token_rule="unknown",
        family=family.name,
        component=family.component,
        streams=streams,
        deltas=tuple(moved.deltas),
        weights_fingerprint=fingerprint(Float32({name: base[name] for name in moved.moved})),
        text_encoder_fingerprint="",
        on=carried(folder),
        source=source,
    )
    return Edit(metadata, tensors), moved.report


def difference(path: Path, folder: Path) -> Moved:
    """What a model folder, or a third party's edited denoiser, changes of the model in ``folder``.

    Raises:
        EditError: ``path`` can't be read, is another model, or doesn't differ.
        ModelError: a folder is missing, incomplete or of an unknown family.
    """
    return _compared(path, folder, family_of(folder), denoiser_weights(folder))[1]


def _compared(path: Path, folder: Path, family: Family, base: Tensors) -> tuple[str, Moved]:
    """The stream whose layers may share a matrix, and the comparison with the model in ``folder``."""
    config = read_json(folder / family.component / "config.json")
    stream_of = {name: family.stream_of(name, config) for name in base}
    names = sorted({stream for stream in stream_of.values() if stream})
    # Layers of several streams have no one matrix between them: their differences are kept.
    sites = [name for name, stream in stream_of.items() if stream] if len(names) == 1 else []
    if path.is_dir():
        other = family_of(path)
        if other.name != family.name:
            raise EditError(f"{path} is a {other.name}, {folder} a {family.name}: compare with its own base")
        new: Mapping[str, Tensor] = denoiser_weights(path)
    else:
        new = read_checkpoint(path, config)
    return names[0] if names else "text", compare(base, new, sites=sites)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
