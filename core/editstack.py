"""Edits on top of edits as one edit: the same weights, in one multiplication.

``W T₁ + D₁`` and then ``W T₂ + D₂`` is ``W T₁T₂ + D₁T₂ + D₂``. Sites that went through the same transforms form a
stream of the stack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from excise import __version__
from excise.editfile import Array, Edit, fingerprint
from excise.editmetadata import EditMetadata, Kept, Stream
from excise.errors import EditError, FingerprintMismatch


def stack(edits: Sequence[Edit], weights: Mapping[str, Array]) -> Edit:
    """One edit that does what ``edits`` do in order.

    Args:
        edits: two or more, each made for what the ones before it leave.
        weights: the original weights of every site of any of them.

    Raises:
        EditError: fewer than two edits, or edits of different components.
        FingerprintMismatch: one wasn't made for what the ones before it leave.
    """
    if len(edits) < 2:
        raise EditError(f"a stack of {len(edits)}: give two edits or more, in the order in which they apply")
    if len({edit.metadata.component for edit in edits}) > 1:
        raise EditError("the edits are for different components (unet, transformer): they can't be stacked")
    sites = tuple(dict.fromkeys(site for edit in edits for site in edit.sites))
    current = dict(weights)
    for number, edit in enumerate(edits, 1):
        try:
            current.update(edit.apply(current))
        except FingerprintMismatch as mismatch:
            before, remedy = "the model", "name the one that it was made for"
            if number > 1:
                before, remedy = f"what edit {number - 1} leaves", "make it for the folder that excise apply wrote"
            reason = str(mismatch).partition(": ")[0]
            raise FingerprintMismatch(
                f"edit {number} ({edit.id[:12]}) wasn't made for {before} ({reason}): {remedy}"
            ) from None
    streams, tensors = _transforms(edits, sites)
    deltas = _deltas(edits, sites)
    first = edits[0].metadata
    metadata = EditMetadata(
        excise_version=__version__,
        method="stack",
        recipe={"parts": [edit.id for edit in edits]},
        concepts=tuple(concept for edit in edits for concept in edit.metadata.concepts),
        kept=Kept(
            count=sum(edit.metadata.kept.count for edit in edits),
            sha256=hashlib.sha256("".join(edit.metadata.kept.sha256 for edit in edits).encode()).hexdigest(),
        ),
        token_rule=first.token_rule,
        family=first.family,
        component=first.component,
        streams=streams,
        deltas=tuple(deltas),
        weights_fingerprint=fingerprint({site: weights[site] for site in sites}),
        text_encoder_fingerprint=first.text_encoder_fingerprint,
        on=first.on,
        parts=tuple((edit.id, edit.metadata) for edit in edits),
    )
    return Edit(metadata, {**tensors, **{f"delta.{site}": delta for site, delta in deltas.items()}})


def _transforms(edits: Sequence[Edit], sites: Sequence[str]) -> tuple[tuple[Stream, ...], dict[str, Array]]:
    """Sites by the transforms that they went through, and each group's product."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for site in sites:
        path = tuple(stream.name if (stream := edit.stream_of(site)) else None for edit in edits)
        if any(path):
            groups.setdefault(path, []).append(site)
    streams: list[Stream] = []
    tensors: dict[str, Array] = {}
    for path, members in groups.items():
        name = next(part for part in path if part)
        if any(stream.name == name for stream in streams):
            name = f"{name}.{len(streams)}"
        through = [edit for edit, part in zip(edits, path, strict=True) if part]
        dims = {stream.dim for edit in through if (stream := edit.stream_of(members[0]))}
        if len(dims) > 1:
            raise EditError(f"the edits read {members[0]} as {sorted(dims)} wide: they can't be stacked")
        dim = dims.pop()
        streams.append(Stream(name=name, dim=dim, sites=tuple(members)))
        shared = all(edit.is_shared(stream) for edit in through if (stream := edit.stream_of(members[0])))
        if shared:
            tensors |= _shared(name, _product(through, members[0], dim))
        else:
            # Every site has a matrix of its own: identity, minus one term for each.
            tensors[f"{name}.steps.0.shared"] = np.eye(dim)
            tensors[f"{name}.steps.0.scaled"] = np.stack([np.eye(dim) - _product(through, s, dim) for s in members])
            tensors[f"{name}.steps.0.scalars"] = np.eye(len(members))
    return tuple(streams), tensors


def _shared(name: str, matrix: Array) -> dict[str, Array]:
    """The transform and its exact factors."""
    left, values, right = np.linalg.svd(matrix - np.eye(len(matrix)))
    rank = int((values > 1e-13 * values[0]).sum())
    root = np.sqrt(values[:rank])
    return {
        f"{name}.transform": matrix,
        f"{name}.left": left[:, :rank] * root,
        f"{name}.right": root[:, None] * right[:rank],
    }


def _product(edits: Sequence[Edit], site: str, dim: int) -> Array:
    product: Array = np.eye(dim)
    for edit in edits:
        product = product @ edit.matrix(site)
    return product


def _deltas(edits: Sequence[Edit], sites: Sequence[str]) -> dict[str, Array]:
    deltas: dict[str, Array] = {}
    for site in sites:
        total: Array | None = None
        for edit in edits:
            if total is not None and edit.stream_of(site) is not None:
                total = total @ edit.matrix(site)
            if (delta := edit.tensors.get(f"delta.{site}")) is not None:
                total = delta.astype(np.float64) + (0 if total is None else total)
        if total is not None:
            deltas[site] = total.astype(np.float32)
    return deltas
