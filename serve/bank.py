"""Which edit of a bank each request gets.

A bank is a UNet with one more input, ``edit_index``; ``excise.bank`` in the file's metadata is the JSON list of its
edits' ids in that order, with null for the base.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from excise.errors import ArtefactError, UsageError
from excise.onnx_metadata import BANK, read_metadata

Bank = tuple[str | None, ...]


def read_bank(file: Path) -> Bank | None:
    """The ids of the edits that a UNet's ONNX file holds, by index, None for the base; None for a file without a bank.

    Raises ``ArtefactError`` if the file isn't an ONNX model, or what it says of its bank isn't a list of ids.
    """
    noted = read_metadata(file).get(BANK)
    if noted is None:
        return None
    try:
        ids = json.loads(noted)
    except ValueError:
        ids = None
    sound = isinstance(ids, list) and ids and all(one is None or isinstance(one, str) for one in ids)
    if not sound or len(set(ids)) < len(ids):
        raise ArtefactError(f"{file} says {noted[:40]!r} of its bank, which is no list of edits: make the bank again")
    return tuple(ids)


def edit_indices(bank: Bank, edits: Sequence[str | None]) -> npt.NDArray[np.int64]:
    """The indices of requested edits, shape (n); None is the base.

    Raises ``UsageError`` for an edit that the bank doesn't hold, the base included: none is ever taken in its place.
    """
    rows = {edit: index for index, edit in enumerate(bank)}
    for edit in edits:
        if edit not in rows:
            held = ", ".join(f"{one[:12]}…" for one in bank if one is not None)
            what = "no edit named, and the bank has no base" if edit is None else f"edit={edit!r} isn't in the bank"
            raise UsageError(f"{what}: name the id of one of its edits ({held})")
    return np.array([rows[edit] for edit in edits], np.int64)
