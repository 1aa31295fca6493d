"""A runtime with a bank: every request gets the edit that it names, and nothing stands in for another."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from excise.editfile import Edit
from excise.errors import ArtefactError, UsageError
from excise.export.bank import add_bank
from excise.serve.bank import edit_indices, read_bank
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request

UNET = "unet/model.onnx"
REQUESTS = [Request("a gun", seed=1), Request("a red apple", "a gun", seed=2), Request("", seed=3)]
SETTINGS = {"num_inference_steps": 5, "guidance_scale": 5.0}


def make(exported: Path, folder: Path, edits: tuple[Edit, ...], *, with_base: bool) -> Path:
    shutil.copytree(exported, folder)
    (folder / UNET).unlink()
    add_bank(exported / UNET, folder / UNET, edits, with_base=with_base)
    return folder


@pytest.fixture(scope="module")
def bank(exported: Path, edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntime:
    folder = make(exported, tmp_path_factory.mktemp("bank") / "onnx", edits, with_base=False)
    return OnnxRuntime(folder, threads=1, batch_size=2)


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_each_request_gets_the_edit_that_it_names(
    bank: OnnxRuntime, versions: tuple[Path, Path], edits: tuple[Edit, Edit], guidance_scale: float
) -> None:
    settings = {"num_inference_steps": 5, "guidance_scale": guidance_scale}
    expected = [OnnxRuntime(folder, threads=1).denoise(REQUESTS, **settings) for folder in versions]
    size = np.abs(expected).max()
    for chosen in ((0, 1, 0), (1, 0, 0), (1, 1, 1)):
        requests = [replace(r, edit=edits[n].id) for r, n in zip(REQUESTS, chosen, strict=True)]
        found = bank.denoise(requests, **settings)
        right = np.stack([expected[number][place] for place, number in enumerate(chosen)])
        wrong = np.stack([expected[1 - number][place] for place, number in enumerate(chosen)])
        assert np.abs(found - right).max() < 1e-5 * size
        assert np.abs(found - wrong).reshape(3, -1).max(axis=1).min() > 1e-3 * size


def test_nothing_stands_in_for_an_edit_that_is_not_there(bank: OnnxRuntime, runtime: OnnxRuntime) -> None:
    with pytest.raises(UsageError, match="no edit named, and the bank has no base"):
        bank.generate(REQUESTS, **SETTINGS)
    with pytest.raises(UsageError, match="edit='0000' isn't in the bank"):
        bank.generate([replace(REQUESTS[0], edit="0000")], **SETTINGS)
    with pytest.raises(UsageError, match="holds no bank of edits"):
        runtime.generate([replace(REQUESTS[0], edit="0000")], **SETTINGS)


def test_the_base_of_a_bank_that_has_it(
    exported: Path, runtime: OnnxRuntime, edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    bank = OnnxRuntime(make(exported, tmp_path / "bank", edits, with_base=True), threads=1)
    found = bank.denoise([*REQUESTS, replace(REQUESTS[0], edit=edits[0].id)], **SETTINGS)
    expected = runtime.denoise(REQUESTS, **SETTINGS)
    assert np.abs(found[:3] - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(found[3] - expected[0]).max() > 1e-3
    with pytest.raises(UsageError, match="name one in each request"):
        OnnxRuntime(bank.folder, edit=edits[0])


def test_a_damaged_bank_is_refused(bank: OnnxRuntime, tmp_path: Path) -> None:
    import onnx

    for number, value in enumerate(["no JSON", "[]", "[1]", '{"a": 1}', None]):
        folder = Path(shutil.copytree(bank.folder, tmp_path / str(number)))
        model = onnx.load(folder / UNET)
        del model.metadata_props[:]
        if value is not None:
            model.metadata_props.add(key="excise.bank", value=value)
        onnx.save(model, folder / UNET)
        with pytest.raises(ArtefactError, match="make the bank again"):
            OnnxRuntime(folder)


def test_the_order_is_the_files(bank: OnnxRuntime, exported: Path, edits: tuple[Edit, Edit]) -> None:
    ids = tuple(edit.id for edit in edits)
    assert read_bank(bank.folder / UNET) == ids == bank.bank
    assert read_bank(exported / UNET) is None
    assert json.loads(json.dumps(edit_indices(ids, [ids[1], ids[0], ids[1]]).tolist())) == [1, 0, 1]
    assert edit_indices((None, *ids), [None, ids[1]]).tolist() == [0, 2]
