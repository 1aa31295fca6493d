"""Write an edit of a given model as a LoRA file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from excise.edit.apply import stored_arrays
from excise.edit.lora import Lora, diffusers_state, kohya_metadata, kohya_state, lora, save_lora
from excise.edit.transform import Step, Transform
from excise.editfile import Edit
from excise.errors import EditError


def write_lora(
    folder: Path, edit: Edit, out: Path, *, kohya: bool, rank: int | None = None, force: bool = False
) -> Lora:
    """Write the LoRA that does to the model in ``folder`` what ``edit`` does.

    Args:
        folder: a diffusers folder.
        edit: one that moves weights by transforms alone.
        out: the ``.safetensors`` file.
        kohya: the layout of A1111 and ComfyUI in place of diffusers'.
        rank: at most this rank; None is exact.
        force: write it although the model isn't the one that the edit was made for.

    Raises:
        EditError: an edit with weight deltas (FingerprintMismatch: for another model).
        UsageError: a rank below 1, or a component that has no such layout.
        OutputError: ``out`` exists or can't be written.
    """
    if edit.metadata.deltas:
        raise EditError(
            f"the edit moves {len(edit.metadata.deltas)} weights by deltas ({edit.metadata.deltas[0]}, …): "
            "only an edit by transforms is a LoRA, apply it to a pipeline instead"
        )
    weights = stored_arrays(folder, edit.sites)
    edit.check(weights, force=force)
    known: dict[str, tuple[Tensor, Tensor]] = {}

    def factors(site: str) -> tuple[Tensor, Tensor]:
        stream = edit.stream_of(site)
        assert stream is not None
        key = stream.name if edit.is_shared(stream) else site
        if key not in known:
            known[key] = _factors(edit, site, key)
        return known[key]

    made = lora({site: torch.from_numpy(weights[site]) for site in edit.sites}, factors, rank=rank)
    if kohya:
        save_lora(out, kohya_state(made), kohya_metadata(made))
    else:
        save_lora(out, diffusers_state(made, edit.metadata.component), {"excise_edit_id": edit.id})
    return made


def _factors(edit: Edit, site: str, stream: str) -> tuple[Tensor, Tensor]:
    """``L`` and ``R`` of ``T_i − I``: the file's, or by SVD where each site has a matrix of its own."""
    if f"{stream}.left" in edit.tensors:
        return torch.from_numpy(edit.tensors[f"{stream}.left"]), torch.from_numpy(edit.tensors[f"{stream}.right"])
    matrix = torch.from_numpy(edit.matrix(site))
    return Transform((Step.of(matrix),), len(matrix)).factors()
