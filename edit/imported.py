"""A third party's edited denoiser as an edit against a given base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

import excise
from excise.edit.apply import carried
from excise.edit.component_files import Float32, Tensors, read_json, weight_files
from excise.edit.families import family_of
from excise.edit.model_folder import WEIGHTS
from excise.edit.third_party import compare, read_checkpoint
from excise.edit.transform import Step, Transform
from excise.editfile import Array, Edit, fingerprint
from excise.editmetadata import EditMetadata, Erased, Kept, Stream


def imported(checkpoint: Path, folder: Path, *, erased: tuple[str, ...] = ()) -> tuple[Edit, list[str]]:
    """The edit that makes the checkpoint of the model in ``folder``, and a report of what it moves.

    Where all layers that read the text moved by one right-multiplication, that is the edit's transform; everything else
    is kept as differences.

    Args:
        checkpoint: as ``third_party.read_checkpoint`` reads it.
        folder: a diffusers folder, the checkpoint's base.
        erased: what the checkpoint is said to have erased; nothing in it tells.

    Raises:
        EditError: a checkpoint that can't be read, of another model, or that changes nothing.
        ModelError: the base is missing, incomplete or of an unknown family.
    """
    family = family_of(folder)
    component = folder / family.component
    config = read_json(component / "config.json")
    base = Tensors(weight_files(component, WEIGHTS))
    stream_of = {name: family.stream_of(name, config) for name in base}
    names = {stream for stream in stream_of.values() if stream}
    # Layers of several streams have no one matrix between them: their differences are kept.
    sites = [name for name, stream in stream_of.items() if stream] if len(names) == 1 else []
    moved = compare(base, read_checkpoint(checkpoint, config), sites=sites)
    tensors: dict[str, Array] = {f"delta.{name}": delta.numpy() for name, delta in moved.deltas.items()}
    streams: tuple[Stream, ...] = ()
    if moved.shared is not None:
        (name,) = names
        assert name is not None
        left, right = Transform((Step.of(moved.shared),), len(moved.shared)).factors(tolerance=1e-9)
        tensors |= {
            f"{name}.{part}": np.ascontiguousarray(tensor.numpy())
            for part, tensor in (("transform", moved.shared), ("left", left), ("right", right))
        }
        streams = (Stream(name=name, dim=len(moved.shared), sites=moved.sites),)
    source: dict[str, Any] = {
        "file": checkpoint.name,
        "sha256": _sha256(checkpoint),
        "compared": moved.compared,
        "moved": len(moved.moved),
        "share_of_parameters": moved.share,
        "shared": moved.shared is not None,
        "residual": moved.residual,
        "rank": moved.rank,
    }
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
