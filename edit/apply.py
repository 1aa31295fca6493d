"""Apply an edit to a diffusers folder: copy it, and rewrite the K and V tensors of the UNet in the copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from excise.edit.model_folder import WEIGHTS, cross_attention_weights, weight_files
from excise.editfile import Edit
from excise.output import check_free, new_folder


def edited_weights(folder: Path, edit: Edit, *, force: bool = False) -> dict[str, torch.Tensor]:
    """The UNet's K and V weights after the edit, in their stored dtype.

    The product is taken on float32 values and rounded once to the stored dtype.

    Raises:
        FingerprintMismatch: the edit is for another model.
        NumericsError: not finite in the stored dtype.
    """
    weights = cross_attention_weights(folder)
    arrays = {
        name: weight.float().numpy() if weight.dtype == torch.bfloat16 else weight.numpy()
        for name, weight in weights.items()
    }
    edited = edit.apply(arrays, force=force)
    return {name: torch.from_numpy(array).to(weights[name].dtype) for name, array in edited.items()}


def apply_edit(folder: Path, edit: Edit, out: Path, *, force: bool = False) -> None:
    """Write an edited diffusers pipeline to ``out``; ``folder`` is left as it is.

    Raises:
        OutputError: ``out`` holds something already or can't be written.
        FingerprintMismatch: the edit is for another model.
    """
    check_free(out)
    edited = edited_weights(folder, edit, force=force)
    touched = weight_files(folder / "unet", WEIGHTS)
    with new_folder(out) as partial:
        shutil.copytree(
            folder,
            partial,
            dirs_exist_ok=True,
            ignore=lambda directory, names: [n for n in names if Path(directory, n) in touched or n.startswith(".git")],
        )
        for file in touched:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
                document = dict(opened.metadata() or {})
            tensors.update({name: edited[name].contiguous() for name in tensors if name in edited})
            save_file(tensors, partial / "unet" / file.name, {**document, "excise_edit_id": edit.id})
            os.chmod(partial / "unet" / file.name, 0o644)
