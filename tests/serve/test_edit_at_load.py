"""An edit that is handed to the runtime computes as the patched folder does, and touches no file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from excise.editfile import Edit
from excise.errors import ArtefactError, FingerprintMismatch
from excise.manifest import NAME, hash_file
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request

REQUESTS = [Request("a gun", seed=1), Request("a cat", seed=2)]


def latents(folder: Path, edit: Edit | None = None) -> np.ndarray:
    runtime = OnnxRuntime(folder, edit=edit, threads=1)
    assert edit is None or runtime.edit_id == edit.id
    return runtime.denoise(REQUESTS, num_inference_steps=3)


def test_it_computes_as_the_patched_folder_does(versions: tuple[Path, Path], edits: tuple[Edit, Edit]) -> None:
    first, second = versions
    before = {path: hash_file(path) for path in first.rglob("*") if path.is_file()}
    np.testing.assert_array_equal(latents(first, edits[1]), latents(second))
    np.testing.assert_array_equal(latents(second, edits[0]), latents(first))
    assert np.abs(latents(first) - latents(second)).max() > 1e-3
    assert {path: hash_file(path) for path in first.rglob("*") if path.is_file()} == before
    assert OnnxRuntime(second, threads=1).edit_id == edits[1].id


def test_an_edit_of_another_model_is_refused(versions: tuple[Path, Path], edits: tuple[Edit, Edit]) -> None:
    metadata = edits[1].metadata.model_copy(update={"weights_fingerprint": "0" * 64})
    with pytest.raises(FingerprintMismatch, match="fingerprint differs"):
        OnnxRuntime(versions[0], edit=Edit(metadata, edits[1].tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initializer": "onnx::MatMul_nowhere"}, "can't be loaded"),
        ({"shape": [1, 1]}, r"with shape \(.*\), not \(1, 1\)"),
        ({"dtype": "float64"}, "can't be loaded"),
        ({"data": None}, "run excise patch on it once"),
    ],
)
def test_what_doesnt_fit_the_model_is_refused(
    versions: tuple[Path, Path], edits: tuple[Edit, Edit], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = tmp_path / "served"
    shutil.copytree(versions[0], folder)
    document = json.loads((folder / NAME).read_text())
    document["weights"][min(document["weights"])].update(change)
    (folder / NAME).write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=message):
        OnnxRuntime(folder, edit=edits[1])


def test_another_graph_than_the_manifests_is_refused(
    versions: tuple[Path, Path], edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    shutil.copytree(versions[0], folder)
    with (folder / "unet" / "model.onnx").open("ab") as stream:
        stream.write(b"\x72\x00")
    with pytest.raises(ArtefactError, match=r"model\.onnx was altered"):
        OnnxRuntime(folder, edit=edits[1])


def test_a_folder_without_a_manifest_names_the_remedy(
    versions: tuple[Path, Path], edits: tuple[Edit, Edit], tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    shutil.copytree(versions[0], folder, ignore=shutil.ignore_patterns(NAME))
    with pytest.raises(ArtefactError, match=r"has no excise\.json"):
        OnnxRuntime(folder, edit=edits[1])
