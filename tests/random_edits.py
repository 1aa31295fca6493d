"""Edits of a model's weights by random matrices near the identity, as files would hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.editfile import Edit, fingerprint
from excise.editmetadata import EditMetadata, Erased, Kept, Stream


def random_edit(
    weights: Mapping[str, NDArray[Any]],
    seed: int,
    *,
    deltas: Mapping[str, NDArray[Any]] | None = None,
    scale: float = 0.1,
    component: str = "unet",
) -> Edit:
    """An edit of the unedited ``weights``, each (o, d) with one d, by one matrix; ``deltas`` are beside them."""
    (dim,) = {weight.shape[1] for weight in weights.values()}
    moved = dict(deltas or {})
    metadata = EditMetadata(
        excise_version="0",
        method="uce",
        recipe={"seed": seed},
        concepts=(Erased(erase=f"concept {seed}", to=" "),),
        kept=Kept.of([]),
        token_rule="all",
        family="stable-diffusion",
        component=component,
        streams=(Stream(name="text", dim=dim, sites=tuple(weights)),),
        deltas=tuple(moved),
        weights_fingerprint=fingerprint(weights),
        text_encoder_fingerprint="0",
    )
    transform = np.eye(dim) + scale * np.random.default_rng(seed).standard_normal((dim, dim))
    return Edit(metadata, {"text.transform": transform, **{f"delta.{name}": values for name, values in moved.items()}})
