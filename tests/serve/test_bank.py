"""A bank's edits are found by id, and nothing stands in for one that isn't there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import excise.export.bank as written
from excise.errors import ArtefactError, UsageError
from excise.onnx_metadata import BANK, EDIT_INDEX, write_metadata
from excise.serve.bank import edit_indices, read_bank

FIRST, SECOND = "1a" * 32, "2b" * 32


def noted(exported: Path, target: Path, value: str) -> Path:
    write_metadata(exported / "unet" / "model.onnx", target, {BANK: value})
    return target


def test_the_names_are_those_that_the_export_writes() -> None:
    assert (BANK, EDIT_INDEX) == (written.BANK, written.EDIT_INDEX)


def test_the_order_is_the_files(exported: Path, tmp_path: Path) -> None:
    assert read_bank(noted(exported, tmp_path / "a.onnx", f'[null, "{FIRST}"]')) == (None, FIRST)
    shutil.copy(exported / "unet" / "model.onnx", tmp_path / "plain.onnx")
    assert read_bank(tmp_path / "plain.onnx") is None


@pytest.mark.parametrize("value", ["", "no JSON", "[]", "[1]", "null", '{"a": 1}', '["a", "a"]'])
def test_what_is_no_list_of_edits_is_refused(exported: Path, tmp_path: Path, value: str) -> None:
    with pytest.raises(ArtefactError, match=r"is no list of edits: make the bank again"):
        read_bank(noted(exported, tmp_path / "model.onnx", value))


def test_requests_are_numbered_by_id() -> None:
    found = edit_indices((FIRST, SECOND), [SECOND, FIRST, SECOND])
    assert (found.dtype, found.tolist()) == (np.int64, [1, 0, 1])
    assert edit_indices((None, FIRST, SECOND), [None, SECOND]).tolist() == [0, 2]
    assert edit_indices((FIRST,), []).shape == (0,)


@pytest.mark.parametrize("edit", ["", "0", FIRST[:12], FIRST.upper()])
def test_an_unknown_edit_is_refused(edit: str) -> None:
    for bank in ((FIRST, SECOND), (None, FIRST)):
        with pytest.raises(UsageError, match=r"isn't in the bank: name the id of one of its edits \(1a1a1a1a1a1a…"):
            edit_indices(bank, [FIRST, edit])


def test_the_base_is_not_the_default() -> None:
    with pytest.raises(UsageError, match="no edit named, and the bank has no base"):
        edit_indices((FIRST, SECOND), [FIRST, None])
