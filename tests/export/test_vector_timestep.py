"""A UNet whose timestep has shape (1): the same outputs, the same edits, a folder that is whole."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from excise.editfile import Edit
from excise.errors import ArtefactError, OutputError
from excise.export.onnx_graph import Graph
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline, read_weights
from excise.export.text_edit_folders import bank_folder, fused_folder
from excise.export.vector_timestep import vector_timestep_folder
from excise.manifest import NAME, hash_file, read_manifest, verify, write_manifest
from excise.onnx_metadata import read_edit_id
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.onnx_signature import read_signature
from excise.serve.runtime import Request
from tests.random_edits import random_edit

UNET = "unet/model.onnx"
REQUESTS = [Request("a gun", seed=1), Request("a cat", "red", seed=2)]


@pytest.fixture(scope="module")
def edits(tiny_model: Path, sites: tuple[str, ...]) -> list[Edit]:
    weights: dict[str, NDArray[Any]] = read_weights(load_pipeline(tiny_model).unet, sites)
    return [random_edit(weights, seed, scale=0.5) for seed in (1, 2)]


@pytest.fixture(scope="module")
def own(tiny_model: Path, edits: list[Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with the first edit. Not to be changed by tests."""
    from excise.export.onnx_export import export_pipeline

    place = tmp_path_factory.mktemp("own")
    export_pipeline(tiny_model, place / "plain")
    patch(place / "plain", edits[0], out=place / "onnx")
    return place / "onnx"


@pytest.fixture(scope="module")
def vector(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a timestep of shape (1). Not to be changed by tests."""
    out = tmp_path_factory.mktemp("vector") / "onnx"
    vector_timestep_folder(own, out)
    return out


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def denoised(folder: Path, **settings: Any) -> NDArray[Any]:
    runtime = OnnxRuntime(folder, threads=1, **settings)
    chosen = runtime.bank or (None, None)
    requests = [replace(request, edit=edit) for request, edit in zip(REQUESTS, chosen, strict=True)]
    return runtime.denoise(requests, num_inference_steps=3)


def test_the_outputs_are_the_same_bit_for_bit(own: Path, vector: Path) -> None:
    scalar, one = (onnxruntime.InferenceSession(folder / UNET) for folder in (own, vector))
    types = {node.name: node for node in one.get_inputs()}
    assert types["timestep"].shape == [1]
    assert next(node for node in scalar.get_inputs() if node.name == "timestep").shape == []
    dtype = np.int64 if types["timestep"].type == "tensor(int64)" else np.float32
    random = np.random.default_rng(0)
    shape = read_signature(own / UNET).inputs["encoder_hidden_states"].shape
    text = random.standard_normal((3, 7, shape[2])).astype(np.float32)
    sample = random.standard_normal((3, 4, 8, 8)).astype(np.float32)
    seen = []
    for step in (0, 1, 500, 999):
        feed = {"sample": sample, "encoder_hidden_states": text}
        (expected,) = scalar.run(None, {**feed, "timestep": np.array(step, dtype)})
        (found,) = one.run(None, {**feed, "timestep": np.array([step], dtype)})
        np.testing.assert_array_equal(found, expected)
        seen.append(found)
    assert np.abs(seen[0] - seen[-1]).max() > 1e-3, "the timestep doesn't show"
    np.testing.assert_array_equal(denoised(vector), denoised(own))


def test_nothing_but_the_graph_and_the_manifest_is_written(own: Path, vector: Path, edits: list[Edit]) -> None:
    assert verify(vector) == []
    before, after = contents(own), contents(vector)
    assert before.keys() == after.keys()
    assert {path for path in before if before[path] != after[path]} == {UNET, NAME}
    assert all((own / path).samefile(vector / path) for path in before if path not in (UNET, NAME))
    assert verify(own) == []
    old, new = read_manifest(own).model_dump(), read_manifest(vector).model_dump()
    assert old.pop("files").keys() == new.pop("files").keys()
    assert old == new
    assert read_edit_id(vector / UNET) == edits[0].id
    plain, graph = Graph(own / UNET), Graph(vector / UNET)
    assert graph.initializers.keys() - plain.initializers.keys() == {"/excise/timestep/axes"}
    assert graph.readers["timestep"] == ["/excise/timestep/Squeeze"]
    assert sorted(graph.readers["/excise/timestep/Squeeze_output_0"]) == sorted(plain.readers["timestep"])


def test_a_later_patch_is_that_of_the_folder_as_it_was(
    own: Path, vector: Path, edits: list[Edit], tmp_path: Path
) -> None:
    patch(vector, edits[1], out=tmp_path / "then patched")
    patch(own, edits[1], out=tmp_path / "patched")
    vector_timestep_folder(tmp_path / "patched", tmp_path / "patched before")
    assert contents(tmp_path / "then patched") == contents(tmp_path / "patched before")
    found = denoised(tmp_path / "then patched")
    np.testing.assert_array_equal(found, denoised(tmp_path / "patched"))
    np.testing.assert_array_equal(found, denoised(vector, edit=edits[1]))
    assert np.abs(found - denoised(vector)).max() > 1e-3, "the edit doesn't show"


@pytest.mark.parametrize("make", [bank_folder, fused_folder])
def test_edits_of_the_text_come_along(own: Path, edits: list[Edit], tmp_path: Path, make: Any) -> None:
    given: Any = edits if make is bank_folder else edits[1]
    make(own.parent / "plain", tmp_path / "made", given)
    manifest = vector_timestep_folder(tmp_path / "made", tmp_path / "vector")
    old = read_manifest(tmp_path / "made")
    assert (manifest.kind, manifest.edit, manifest.bank) == (old.kind, old.edit, old.bank)
    assert verify(tmp_path / "vector") == []
    np.testing.assert_array_equal(denoised(tmp_path / "vector"), denoised(tmp_path / "made"))


def test_files_are_shared_with_another_export(own: Path, vector: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(own, tmp_path / "elsewhere"))
    vector_timestep_folder(folder, tmp_path / "out", like=vector)
    assert (tmp_path / "out/vae_decoder/model.onnx").samefile(vector / "vae_decoder/model.onnx")
    assert contents(tmp_path / "out") == contents(vector)


def test_symbolic_links_arrive_as_files(own: Path, vector: Path, tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    for name in contents(own):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(own / name)
    vector_timestep_folder(folder, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert contents(tmp_path / "out") == contents(vector)


def test_an_engine_of_the_unet_is_left(own: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(own, tmp_path / "engines"))
    for part in ("unet", "vae_decoder"):
        for file in ("model.engine", "model.engine.json"):
            (folder / part / file).write_text("{}")
    manifest = read_manifest(folder)
    weights = {name: one.model_copy(update={"engine_weight": "w"}) for name, one in manifest.weights.items()}
    write_manifest(
        folder,
        kind=manifest.kind,
        base=manifest.base,
        edit=manifest.edit,
        weights=weights,
        base_weights=manifest.base_weights,
    )
    made = vector_timestep_folder(folder, tmp_path / "out")
    assert {path for path in made.files if "engine" in path} == {
        "vae_decoder/model.engine",
        "vae_decoder/model.engine.json",
    }
    assert {one.engine_weight for one in made.weights.values()} == {None}
    assert verify(tmp_path / "out") == []


def test_what_cant_be(own: Path, vector: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArtefactError, match=r"takes timestep with shape \[1\], no scalar"):
        vector_timestep_folder(vector, out)
    with pytest.raises(ArtefactError, match=r"no excise\.json"):
        vector_timestep_folder(own / "unet", out)
    broken = Path(shutil.copytree(own, tmp_path / "broken"))
    (broken / "vae_decoder/model.onnx").unlink()
    with pytest.raises(ArtefactError, match=r"vae_decoder/model\.onnx is missing"):
        vector_timestep_folder(broken, out)
    data = bytearray((broken / UNET).read_bytes())
    data[-1] ^= 1  # of the edit's id
    (broken / UNET).write_bytes(data)
    with pytest.raises(ArtefactError, match=r"unet/model\.onnx was altered"):
        vector_timestep_folder(broken, out)
    (broken / UNET).unlink()
    with pytest.raises(ArtefactError, match=r"no unet/model\.onnx"):
        vector_timestep_folder(broken, out)
    with pytest.raises(OutputError, match="not empty"):
        vector_timestep_folder(own, own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
