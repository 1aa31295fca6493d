"""An exported folder opened in every way that a canary's recording compares."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from excise.edited_initializers import base_weights
from excise.editfile import Edit, fingerprint
from excise.editmetadata import EditMetadata, Erased, Kept, Stream
from excise.errors import ArtefactError, EditError
from excise.manifest import NAME, read_manifest
from excise.serve.onnx_runtime import OnnxRuntime


def opened(folder: Path) -> tuple[OnnxRuntime, list[OnnxRuntime], OnnxRuntime | None]:
    """The model; the same with another number of threads; and the same without its edit, None where that isn't kept.

    Raises:
        ArtefactError, ModelError: as ``OnnxRuntime``.
    """
    runtime = OnnxRuntime(folder, threads=1)
    threads = max(2, (os.cpu_count() or 2) // 2)
    return runtime, [OnnxRuntime(folder, threads=threads)], unedited(folder) if runtime.edit_id is not None else None


def unedited(folder: Path) -> OnnxRuntime | None:
    """An edited export with its unedited weights, in memory alone; None where they can't be put back."""
    if not (folder / NAME).is_file() or read_manifest(folder).base_weights is None:
        return None
    try:
        return OnnxRuntime(folder, edit=_nothing(folder))
    except (ArtefactError, EditError):
        # baked with weights that a patch can't reach, or with weights in the graph's own file
        return None


def _nothing(folder: Path) -> Edit:
    """An edit that moves nothing: identity on one weight, of which all others are left as they were before any edit."""
    manifest = read_manifest(folder)
    with base_weights(folder, manifest) as stored:
        name, weight = next((name, stored[name]) for name in stored if stored[name].ndim == 2)
    metadata = EditMetadata(
        excise_version=manifest.excise,
        method="uce",
        recipe={},
        concepts=(Erased(erase=" ", to=" "),),
        kept=Kept.of([]),
        token_rule="all",
        family="stable-diffusion",
        streams=(Stream(name="text", dim=weight.shape[1], sites=(name,)),),
        weights_fingerprint=fingerprint({name: weight}),
        text_encoder_fingerprint="0",
    )
    return Edit(metadata, {"text.transform": np.eye(weight.shape[1])})
