"""Folders with a bank, or with an edit behind the text encoder: whole, described, and not to be patched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from excise.cli_bank import bank, fuse
from excise.editfile import Edit, save_edit
from excise.errors import ArtefactError, EditError, ExciseError, FingerprintMismatch, OutputError, UsageError
from excise.export.bank import BANK
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline, read_weights
from excise.export.text_edit_folders import bank_folder, fused_folder
from excise.manifest import hash_file, read_manifest, verify
from excise.onnx_metadata import read_edit_id, read_metadata
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from tests.export.text_edits import UNET, baked_outputs, in_one_file, inputs_of, outputs
from tests.random_edits import random_edit


@pytest.fixture(scope="module")
def own(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose files may have other links. Not to be changed by tests."""
    from excise.export.onnx_export import export_pipeline

    out = tmp_path_factory.mktemp("own") / "onnx"
    export_pipeline(tiny_model, out)
    return out


@pytest.fixture(scope="module")
def edits(tiny_model: Path, sites: tuple[str, ...]) -> list[Edit]:
    weights: dict[str, NDArray[Any]] = read_weights(load_pipeline(tiny_model).unet, sites)
    return [random_edit(weights, seed) for seed in (1, 2)]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def test_a_bank(own: Path, tiny_model: Path, edits: list[Edit], tmp_path: Path) -> None:
    before = contents(own)
    manifest, description = bank_folder(own, tmp_path / "bank", edits, with_base=True)
    assert contents(own) == before
    assert verify(tmp_path / "bank") == []
    assert manifest == read_manifest(tmp_path / "bank")
    assert (manifest.kind, manifest.edit, manifest.base) == ("onnx-bank", None, read_manifest(own).base)
    assert json.loads(read_metadata(tmp_path / "bank" / UNET)[BANK]) == list(description.ids)
    after = contents(tmp_path / "bank")
    assert {path for path in before if before[path] != after.get(path)} == {
        UNET,
        "unet/base.safetensors",
        "excise.json",
    }
    inputs = inputs_of(tiny_model, ("a gun", "a cat", ""))
    baked = baked_outputs(in_one_file(own, tmp_path / "whole") / UNET, edits, inputs, tmp_path)
    found = outputs(tmp_path / "bank" / UNET, inputs, [2, 0, 1])
    assert np.abs(found - np.stack([baked[2, 0], baked[0, 1], baked[1, 2]])).max() < 1e-5


def test_an_edit_behind_the_text_encoder(own: Path, edits: list[Edit], tmp_path: Path) -> None:
    before = contents(own)
    manifest = fused_folder(own, tmp_path / "fused", edits[0])
    assert contents(own) == before
    assert verify(tmp_path / "fused") == []
    assert manifest.edit is not None
    assert (manifest.kind, manifest.edit.id) == ("onnx-fused", edits[0].id)
    assert read_edit_id(tmp_path / "fused" / "text_encoder" / "model.onnx") == edits[0].id
    for file in ("model.onnx", "model.onnx_data", "edit.onnx_data"):
        assert (tmp_path / "fused" / "unet" / file).samefile(own / "unet" / file)
    patch(own, edits[0], out=tmp_path / "patched")
    requests, settings = [Request("a gun", seed=1), Request("a cat", "red", seed=2)], {"num_inference_steps": 4}
    fused, patched, plain = (
        OnnxRuntime(folder, threads=1).denoise(requests, **settings)
        for folder in (tmp_path / "fused", tmp_path / "patched", own)
    )
    size = np.abs(patched).max()
    assert np.abs(fused - patched).max() < 1e-5 * size
    assert np.abs(plain - patched).max() > 1e-3 * size


@pytest.mark.parametrize("kind", ["bank", "fused"])
def test_neither_is_edited_again(own: Path, edits: list[Edit], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "first"
    if kind == "bank":
        bank_folder(own, folder, edits)
    else:
        fused_folder(own, folder, edits[0])
    before = contents(folder)
    for again in (
        lambda: bank_folder(folder, tmp_path / "out", edits),
        lambda: fused_folder(folder, tmp_path / "out", edits[1]),
        lambda: patch(folder, edits[1], out=tmp_path / "out"),
        lambda: OnnxRuntime(folder, edit=edits[1]),
    ):
        with pytest.raises((ArtefactError, UsageError)):
            again()
    assert contents(folder) == before
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(own: Path, edits: list[Edit], tmp_path: Path) -> None:
    foreign = Edit(edits[0].metadata.model_copy(update={"weights_fingerprint": "0" * 64}), edits[0].tensors)
    before = contents(own)
    for make in (
        lambda: bank_folder(own, tmp_path / "out", [foreign]),
        lambda: fused_folder(own, tmp_path / "out", foreign),
    ):
        with pytest.raises(FingerprintMismatch):
            make()
    patch(own, edits[0], out=tmp_path / "patched")
    with pytest.raises(ArtefactError, match=r"carries edit .* already"):
        fused_folder(tmp_path / "patched", tmp_path / "out", edits[1])
    with pytest.raises(EditError, match="another model"):
        bank_folder(tmp_path / "patched", tmp_path / "out", edits[1:])
    with pytest.raises(UsageError, match="no edits"):
        bank_folder(own, tmp_path / "out", [])
    with pytest.raises(OutputError, match="not empty"):
        bank_folder(own, own, edits)
    assert {path.name for path in tmp_path.iterdir()} == {"patched"}
    assert contents(own) == before


def test_the_commands(own: Path, edits: list[Edit], tmp_path: Path) -> None:
    files = [str(tmp_path / f"{number}.safetensors") for number in range(2)]
    for file, edit in zip(files, edits, strict=True):
        save_edit(Path(file), edit)
    given = [str(own), "--edit", files[0], "--edit", files[1]]
    ran = CliRunner().invoke(bank, [*given, "--out", str(tmp_path / "bank"), "--with-base"], catch_exceptions=False)
    assert ran.exit_code == 0
    lines = ran.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["0", "base"],
        ["1", edits[0].id[:12]],
        ["2", edits[1].id[:12]],
    ]
    ran = CliRunner().invoke(bank, [*given, "--out", str(tmp_path / "j"), "--json", "--copy"], catch_exceptions=False)
    document = json.loads(ran.stdout)
    assert [row["id"] for row in document["bank"]["rows"]] == [edit.id for edit in edits]
    assert not (tmp_path / "j" / "unet" / "model.onnx_data").samefile(own / "unet" / "model.onnx_data")
    with pytest.raises(ExciseError, match="is given 2 times"):
        CliRunner().invoke(bank, [*given, "--edit", files[0], "--out", str(tmp_path / "x")], catch_exceptions=False)
    out = str(tmp_path / "fused")
    ran = CliRunner().invoke(fuse, [str(own), "--edit", files[0], "--out", out], catch_exceptions=False)
    assert ran.exit_code == 0
    assert "behind the text encoder" in ran.stdout
    assert verify(tmp_path / "fused") == []


# --- engines, and edits for another base ------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "component"), [(bank_folder, "unet"), (fused_folder, "text_encoder")])
def test_the_engine_of_the_model_that_changes_is_left_out(
    own: Path, edits: list[Edit], tmp_path: Path, make: Any, component: str
) -> None:
    folder = tmp_path / "engines"
    shutil.copytree(own, folder)
    for name in ("unet", "text_encoder", "vae_decoder"):
        (folder / name / "model.engine").write_bytes(b"plan")
        (folder / name / "model.engine.json").write_text("{}")
    said: list[str] = []
    make(folder, tmp_path / "out", edits[:1] if make is bank_folder else edits[0], progress=said.append)
    left = {path.parent.name for path in (tmp_path / "out").rglob("model.engine*")}
    assert left == {"unet", "text_encoder", "vae_decoder"} - {component}
    assert f"leaving {component}/model.engine out: it was built of the model as it was" in said[0]
    assert not any(".excise-partial" in line for line in said)


def test_an_edit_on_top_of_an_edit_says_where_to_start(own: Path, edits: list[Edit], tmp_path: Path) -> None:
    patch(own, edits[0], out=tmp_path / "edited")
    with pytest.raises(
        FingerprintMismatch, match=r"edited carries edit \w{12}, and .*: start from the unedited export$"
    ):
        bank_folder(tmp_path / "edited", tmp_path / "bank", edits[1:])
    foreign = Edit(edits[0].metadata.model_copy(update={"weights_fingerprint": "0" * 64}), edits[0].tensors)
    for make, given in ((bank_folder, [foreign]), (fused_folder, foreign)):
        with pytest.raises(FingerprintMismatch, match="another model") as caught:
            make(own, tmp_path / "bank", given)  # type: ignore[operator]
        assert "--force" not in str(caught.value)  # neither command has it
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]
