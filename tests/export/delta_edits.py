"""Edits that move weights of every kind by random differences, as training does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.editfile import Edit, fingerprint
from excise.editmetadata import EditMetadata, Erased, Kept


def delta_edit(
    weights: Mapping[str, NDArray[Any]], seed: int, names: Sequence[str] | None = None, *, scale: float = 0.1
) -> Edit:
    """Every weight of ``names`` (all by default) moved by ``scale`` times its mean size, or 1 where it is 0."""
    random = np.random.default_rng(seed)
    moved = {name: weights[name] for name in (weights if names is None else names)}
    deltas = {
        name: (scale * (np.abs(values).mean() or 1.0) * random.standard_normal(values.shape)).astype(np.float32)
        for name, values in moved.items()
    }
    metadata = EditMetadata(
        excise_version="0",
        method="esd-u",
        recipe={"seed": seed},
        concepts=(Erased(erase=f"concept {seed}", to=" "),),
        kept=Kept.of([]),
        token_rule="none",
        family="stable-diffusion",
        streams=(),
        deltas=tuple(deltas),
        weights_fingerprint=fingerprint(moved),
        text_encoder_fingerprint="0",
    )
    return Edit(metadata, {f"delta.{name}": values for name, values in deltas.items()})
