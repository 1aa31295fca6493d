"""What training changed of a denoiser, as an edit: a difference for each weight that moved.

``W' − W`` is rounded to float32 once, and applying the edit to a float32 model rounds ``W + delta`` once more. Where a
weight stays within a factor of 2 of what it was, both are exact (Sterbenz) and the edited model has the trained weights
bit for bit, and so where it was 0; elsewhere it is within one unit in the last place of the larger of W and W'. A model
that is stored in half precision rounds the sum to that, as with any edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import excise
from excise.edit.apply import carried
from excise.edit.component_files import Float32, Tensors
from excise.edit.families import family_of
from excise.edit.model_folder import denoiser_weights
from excise.editfile import Edit, fingerprint
from excise.editmetadata import EditMetadata, Erased, Kept, TrainingFigures
from excise.errors import ModelError, NumericsError


def weight_deltas(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``after − before`` in float32 on the CPU, of each weight that moved, in order of name.

    Raises:
        NumericsError: a weight isn't finite, or none moved.
    """
    deltas: dict[str, Tensor] = {}
    for name in sorted(after):
        new, old = (weights[name].detach().cpu().to(torch.float32) for weights in (after, before))
        if not bool(torch.isfinite(new).all()):
            raise NumericsError(f"{name} isn't finite after training: give a smaller --parameter learning_rate")
        if not torch.equal(old, new):
            deltas[name] = new - old
    if not deltas:
        raise NumericsError("training moved no weight: give more --iterations, or a larger --parameter learning_rate")
    return deltas


def delta_edit(
    folder: Path,
    deltas: Mapping[str, Tensor],
    *,
    method: str,
    preset: str | None,
    recipe: dict[str, Any],
    concepts: tuple[Erased, ...],
    kept: Kept,
    text_encoder_fingerprint: str,
    losses: tuple[float, ...],
) -> Edit:
    """The edit of the model in ``folder`` that adds ``deltas`` to its denoiser.

    Args:
        folder: a diffusers folder.
        deltas: float32, by the weights' names.
        losses: of every iteration, one or more.

    The other arguments are ``EditMetadata``'s.

    Raises:
        ModelError: the folder stores a weight under no such name, or is incomplete.
    """
    family, stored = family_of(folder), denoiser_weights(folder)
    if missing := [name for name in deltas if name not in stored]:
        raise ModelError(f"{folder} stores no {missing[0]}: save the pipeline anew with this version of diffusers")
    tenth = max(1, len(losses) // 10)
    metadata = EditMetadata(
        excise_version=excise.__version__,
        method=method,
        preset=preset,
        recipe=recipe,
        concepts=concepts,
        kept=kept,
        token_rule="none",
        family=family.name,
        component=family.component,
        streams=(),
        deltas=tuple(deltas),
        weights_fingerprint=fingerprint(Float32({name: stored[name] for name in deltas})),
        text_encoder_fingerprint=text_encoder_fingerprint,
        on=carried(folder),
        training=TrainingFigures(
            iterations=len(losses),
            loss_before=sum(losses[:tenth]) / tenth,
            loss_after=sum(losses[-tenth:]) / tenth,
            share_of_parameters=sum(delta.numel() for delta in deltas.values()) / _count(stored),
        ),
    )
    return Edit(metadata, {f"delta.{name}": delta.numpy() for name, delta in deltas.items()})


def _count(stored: Tensors) -> int:
    """All the numbers of a component; only headers are read."""
    return sum(torch.Size(stored.header(name)[1]).numel() for name in stored)
