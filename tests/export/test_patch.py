"""A patch equals a fresh export, touches nothing else, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from excise.editfile import Edit
from excise.errors import ArtefactError, EditError, FingerprintMismatch, NumericsError, OutputError
from excise.export.layout import separate
from excise.export.onnx_graph import Graph
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline, read_weights
from excise.export.quiet import quiet
from excise.manifest import NAME, hash_file, read_manifest, verify
from excise.onnx_metadata import read_edit_id
from excise.output import PARTIAL
from tests.random_edits import random_edit


@pytest.fixture(scope="module")
def weights(tiny_model: Path, sites: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The unedited weights, each (o, d)."""
    return {name: np.array(value) for name, value in read_weights(load_pipeline(tiny_model).unet, sites).items()}


MakeEdit = Callable[..., Edit]


@pytest.fixture(scope="module")
def make_edit(weights: dict[str, NDArray[Any]]) -> MakeEdit:
    """An edit of the tiny model by its seed; of some sites, and with more options of ``random_edit``, if asked."""

    def make(seed: int, *, sites: tuple[str, ...] | None = None, **options: Any) -> Edit:
        return random_edit({name: weights[name] for name in sites or weights}, seed, **options)

    return make


@pytest.fixture(scope="module")
def first(optimum: Path, make_edit: MakeEdit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Optimum's folder patched with edit 1. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("first") / "onnx"
    patch(optimum, make_edit(1), out=out)
    return out


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def initialisers(path: Path) -> dict[str, NDArray[Any]]:
    """Every initialiser by the onnx package, external data included; it refuses hard links, so a copy is read."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(path.parent, folder, dirs_exist_ok=True)
        path = Path(folder) / path.name
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_a_plain_export_is_converted_with_every_value(
    first: Path, optimum: Path, make_edit: MakeEdit, weights: dict[str, NDArray[Any]]
) -> None:
    before, after = initialisers(optimum / "unet/model.onnx"), initialisers(first / "unet/model.onnx")
    manifest = read_manifest(first)
    assert verify(first) == []
    assert set(manifest.weights) == set(weights)
    expected = make_edit(1).apply(weights)
    for name, entry in manifest.weights.items():
        np.testing.assert_array_equal(before.pop(entry.initializer), weights[name].T)
        np.testing.assert_array_equal(after.pop(entry.initializer), expected[name].T)
        assert entry.data == "unet/edit.onnx_data"
        assert entry.offset % 4096 == 0
    assert set(before) <= set(after)
    assert all(max(after[name].shape) == after[name].size for name in set(after) - set(before)), "norms, once merged"
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])
    assert read_edit_id(first / "unet/model.onnx") == make_edit(1).id == manifest.edit.id  # type: ignore[union-attr]
    assert (first / "unet/model.onnx").stat().st_size < 0.5 * (optimum / "unet/model.onnx").stat().st_size


def test_a_patch_equals_a_fresh_export_of_the_edited_model(
    tiny_model: Path, plain: Path, first: Path, make_edit: MakeEdit, tmp_path: Path
) -> None:
    from excise.export.onnx_export import export_pipeline

    export_pipeline(tiny_model, tmp_path / "fresh", edit=make_edit(1))
    patch(plain, make_edit(1), out=tmp_path / "patched", link=False)
    fresh, patched = contents(tmp_path / "fresh"), contents(tmp_path / "patched")
    del fresh[NAME], patched[NAME]
    assert fresh == patched
    model = [name for name in fresh if name.startswith("unet/") and not name.endswith(".json")]
    assert len(model) == 4
    assert [hash_file(first / name) for name in model] == [fresh[name] for name in model]
    a, b = read_manifest(tmp_path / "fresh"), read_manifest(tmp_path / "patched")
    assert a.parity
    assert not b.parity
    assert a.model_copy(update={"parity": {}}) == b
    assert fresh != {name: value for name, value in contents(plain).items() if name != NAME}


def test_the_converted_folder_is_untouched(optimum: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    before = contents(optimum)
    patch(optimum, make_edit(1), out=tmp_path / "out")
    assert contents(optimum) == before


def test_patched_from_base_and_from_another_edit_are_the_same(
    first: Path, optimum: Path, make_edit: MakeEdit, tmp_path: Path
) -> None:
    patch(optimum, make_edit(2), out=tmp_path / "from base")
    patch(first, make_edit(2), out=tmp_path / "from 1")
    ours, theirs = contents(tmp_path / "from base"), contents(tmp_path / "from 1")
    del ours[NAME], theirs[NAME]
    assert ours == theirs
    a, b = read_manifest(tmp_path / "from base"), read_manifest(tmp_path / "from 1")
    assert a.model_copy(update={"base": b.base}) == b
    assert ours != {name: value for name, value in contents(first).items() if name != NAME}


def test_an_edit_of_fewer_sites_leaves_the_others_unedited(
    first: Path, make_edit: MakeEdit, weights: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    some = tuple(name for name in weights if "to_k" in name)
    edit = make_edit(3, sites=some)
    patch(first, edit, out=tmp_path / "out")
    found = initialisers(tmp_path / "out/unet/model.onnx")
    moved = edit.apply(weights)
    for name, entry in read_manifest(tmp_path / "out").weights.items():
        np.testing.assert_array_equal(found[entry.initializer], moved.get(name, weights[name]).T)


def test_versions_share_everything_but_the_edit(first: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    patch(first, make_edit(2), out=out)
    own = {name for name in contents(out) if not os.path.samefile(out / name, first / name)}
    assert own == {"unet/model.onnx", "unet/edit.onnx_data", NAME}
    assert verify(first) == verify(out) == []


def test_copies_are_of_one_link_each(first: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    patch(first, make_edit(2), out=tmp_path / "out", link=False)
    assert {path.stat().st_nlink for path in (tmp_path / "out").rglob("*") if path.is_file()} == {1}
    onnx.load(tmp_path / "out/unet/model.onnx")


def test_an_engine_of_the_present_edit_doesnt_come_along(first: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(first, folder)
    for component in ("unet", "vae_decoder"):
        (folder / component / "model.engine").write_bytes(b"plan")
        (folder / component / "model.engine.json").write_text("{}")
    before = contents(folder)
    with pytest.raises(OutputError, match=r"unet/model\.engine holds the present edit: name a new folder with --out"):
        patch(folder, make_edit(2))
    assert contents(folder) == before
    patch(folder, make_edit(2), out=tmp_path / "out")
    assert [path.parent.name for path in (tmp_path / "out").rglob("*.engine*")] == ["vae_decoder", "vae_decoder"]
    assert contents(folder) == before


def test_in_place_the_folder_keeps_what_else_lies_in_it(first: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(first, folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("kept")
    (folder / "link").symlink_to("notes/mine.txt")
    patch(folder, make_edit(2))
    assert (folder / "notes" / "mine.txt").read_text() == "kept"
    assert (folder / "link").is_symlink()
    assert read_edit_id(folder / "unet/model.onnx") == make_edit(2).id
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_the_patched_model_computes_as_the_edited_torch_model(
    first: Path, tiny_model: Path, make_edit: MakeEdit
) -> None:
    from tests.export.unet_parity import unet_parity

    base, edited = load_pipeline(tiny_model).unet, load_pipeline(tiny_model, make_edit(1)).unet
    states = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    assert unet_parity(base, edited, first / "unet/model.onnx", states).relative < 1e-4
    assert unet_parity(edited, base, first / "unet/model.onnx", states).relative > 0.9


# --- killed at any moment ----------------------------------------------------------------------------------------

_EVENTS = ("open", "os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym")


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a child that dies at its ``number``-th step on the disk; whether it died."""
    child = os.fork()
    if child == 0:
        left = number

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in _EVENTS:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(hook)
        status = 8
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 9


def test_a_kill_leaves_the_old_model_or_the_new_one(first: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    patch(first, make_edit(2), out=tmp_path / "new")
    old, new = contents(first), contents(tmp_path / "new")
    seen = set()
    for number in range(1000):
        folder = tmp_path / "served"
        shutil.copytree(first, folder, copy_function=os.link)
        died = killed_at(number, lambda folder=folder: patch(folder, make_edit(2)))
        found = contents(folder)
        assert found in (old, new), f"a mixture at step {number}"
        assert verify(folder) == []
        seen.add(found == new)
        shutil.rmtree(folder)
        for path in tmp_path.glob(f"{PARTIAL}*"):
            shutil.rmtree(path)
        if not died:
            break
    assert seen == {False, True}
    assert number > 30
    assert contents(first) == old


# --- refused ------------------------------------------------------------------------------------------------------


def test_an_edit_for_another_model_is_refused(
    first: Path, make_edit: MakeEdit, weights: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    edit = make_edit(2)
    foreign = Edit(edit.metadata.model_copy(update={"weights_fingerprint": "0" * 64}), edit.tensors)
    with pytest.raises(FingerprintMismatch, match="fingerprint differs"):
        patch(first, foreign, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    patch(first, foreign, out=tmp_path / "out", force=True)
    assert read_edit_id(tmp_path / "out/unet/model.onnx") == foreign.id


def test_an_edit_for_a_transformer_is_refused(first: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    other = make_edit(2, component="transformer")
    with pytest.raises(EditError, match=r"is for a transformer, and .* has a unet"):
        patch(first, other, out=tmp_path / "out")


@pytest.mark.parametrize("damage", ["altered", "cut", "missing"])
def test_damaged_unedited_weights_are_refused(first: Path, make_edit: MakeEdit, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "served"
    shutil.copytree(first, folder)
    path = folder / "unet/base.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "altered" else data[:-4])
    with pytest.raises(ArtefactError, match=r"base\.safetensors (was altered|is missing|.*isn't as long)"):
        patch(folder, make_edit(2), out=tmp_path / "out")


def test_what_is_no_finite_half_is_refused(first: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(first, folder)
    document = json.loads((folder / NAME).read_text())
    for entry in document["weights"].values():
        entry["dtype"] = "float16"
    (folder / NAME).write_text(json.dumps(document))
    with pytest.raises(NumericsError, match=r"isn't finite in float16: export the model in fp32"):
        patch(folder, make_edit(2, scale=1e6), out=tmp_path / "out")


def test_a_fused_graph_is_refused(optimum: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    shutil.copytree(optimum, folder)
    model = onnx.load(folder / "unet/model.onnx")
    model.graph.node.append(
        onnx.helper.make_node("MultiHeadAttention", ["sample"], ["z"], name="attention", domain="com.microsoft")
    )
    onnx.save(model, folder / "unet/model.onnx")
    with pytest.raises(ArtefactError, match=r"was fused by ONNX Runtime \(MultiHeadAttention\)"):
        patch(folder, make_edit(2), out=tmp_path / "out")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_export_is_refused(make_edit: MakeEdit, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=r"isn't a folder|has no unet/model\.onnx"):
        patch(tmp_path / name, make_edit(2), out=tmp_path / "out")


# --- the layout itself --------------------------------------------------------------------------------------------


def test_external_data_that_is_there_stays_as_it_is(optimum: Path, sites: tuple[str, ...], tmp_path: Path) -> None:
    before = initialisers(optimum / "unet/model.onnx")
    onnx.save(
        onnx.load(optimum / "unet/model.onnx"),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=1024,
    )
    rest = hash_file(tmp_path / "model.onnx_data")
    separate(tmp_path / "model.onnx", sites, keep=True)
    assert hash_file(tmp_path / "model.onnx_data") == rest
    after = initialisers(tmp_path / "model.onnx")
    assert set(before) == set(after)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])
    graph = Graph(tmp_path / "model.onnx")
    places = {graph.locate(site).initializer for site in sites}
    for name, tensor in graph.initializers.items():
        where = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
        assert (where == "edit.onnx_data") == (name in places)


# --- torch's dynamo exporter --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamo(optimum: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Optimum's folder with the UNet by torch's dynamo exporter, which anonymises nodes and notes their scopes."""
    import torch

    folder = tmp_path_factory.mktemp("dynamo") / "onnx"
    shutil.copytree(optimum, folder)
    unet = load_pipeline(tiny_model).unet
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(10.0), torch.randn(2, 24, 32))
    with quiet():
        torch.onnx.export(
            unet, inputs, folder / "unet/model.onnx", dynamo=True, kwargs={"return_dict": False}, verbose=False
        )
    return folder


def test_an_export_by_dynamo_is_patched(
    dynamo: Path, make_edit: MakeEdit, weights: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    assert not any("attn2" in name for name in Graph(dynamo / "unet/model.onnx").nodes)
    patch(dynamo, make_edit(1), out=tmp_path / "out")
    moved = make_edit(1).apply(weights)
    found = initialisers(tmp_path / "out/unet/model.onnx")
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest.weights) == set(weights)
    for name, entry in manifest.weights.items():
        np.testing.assert_array_equal(found[entry.initializer], moved[name].T if entry.transposed else moved[name])


def test_scopes_that_name_two_nodes_are_refused(dynamo: Path, make_edit: MakeEdit, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(dynamo, folder)
    model = onnx.load(folder / "unet/model.onnx")
    node = next(n for n in model.graph.node if any("attn2.to_k" in entry.value for entry in n.metadata_props))
    again = model.graph.node.add()
    again.CopyFrom(node)
    again.name, again.output[0] = "again", "again"
    onnx.save(model, folder / "unet/model.onnx")
    with pytest.raises(ArtefactError, match=r"has 2 MatMul nodes of .*attn2\.to_k .*can't be told"):
        patch(folder, make_edit(1), out=tmp_path / "out")
