"""Edits that move any weight of the UNet, as training does: exported, patched, put in at load time and verified."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from excise.cli import main
from excise.editfile import Edit, save_edit
from excise.errors import ArtefactError, EditError, FingerprintMismatch
from excise.export.layout import separate
from excise.export.onnx_export import export_pipeline
from excise.export.onnx_graph import Graph
from excise.export.options import ExportOptions
from excise.export.parity import onnx_outputs, torch_outputs
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline
from excise.export.weight_map import map_weights
from excise.manifest import NAME, read_manifest, verify
from excise.onnx_metadata import read_edit_id
from excise.output import PARTIAL
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from tests.export.delta_edits import delta_edit
from tests.export.test_patch import contents, initialisers, killed_at
from tests.export.unet_parity import make_inputs
from tests.random_edits import random_edit

Weights = dict[str, NDArray[Any]]
MODEL = "unet/model.onnx"
#: One of each kind; the tiny model's norms are all equal, so that the exporter merges those that aren't moved.
SOME = (
    "conv_in.weight",
    "conv_out.bias",
    "time_embedding.linear_1.bias",
    "down_blocks.0.resnets.0.norm1.weight",
    "down_blocks.0.resnets.0.norm2.bias",
    "mid_block.attentions.0.norm.bias",
    "mid_block.attentions.0.transformer_blocks.0.norm2.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
    "up_blocks.0.resnets.0.time_emb_proj.weight",
)


def parameters(model: Path) -> Weights:
    """Every weight of a pipeline's UNet."""
    return {name: value.detach().numpy() for name, value in load_pipeline(model).unet.named_parameters()}


@pytest.fixture(scope="module")
def weights(tiny_model: Path) -> Weights:
    return parameters(tiny_model)


@pytest.fixture(scope="module")
def some(weights: Weights) -> Edit:
    return delta_edit(weights, 1, SOME)


@pytest.fixture(scope="module")
def every(weights: Weights) -> Edit:
    """Of every weight of the UNet."""
    return delta_edit(weights, 2)


@pytest.fixture(scope="module")
def wide(plain: Path, every: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain export patched with an edit of every weight. Not to be changed by tests."""
    out = tmp_path_factory.mktemp("wide") / "onnx"
    patch(plain, every, out=out)
    return out


# --- every weight has its place ---------------------------------------------------------------------------------------


def check_every_place(folder: Path, weights: Weights, edit: Edit) -> None:
    """Each weight is in one initialiser with the edit's values, and each initialiser is one weight, by value too."""
    expected = edit.apply(weights)
    entries, found = read_manifest(folder).weights, initialisers(folder / MODEL)
    assert set(entries) == set(weights)
    assert len({entry.initializer for entry in entries.values()}) == len(weights)
    by_value = {name: values for name, values in found.items() if values.dtype == np.float32 and values.size > 1}
    assert {entry.initializer for entry in entries.values()} == set(by_value)
    for name, entry in entries.items():
        held = by_value[entry.initializer]
        np.testing.assert_array_equal(
            held.squeeze(), (expected[name].T if entry.transposed else expected[name]).squeeze()
        )
        same = [
            other for other, values in expected.items() if np.array_equal(values.squeeze(), expected[name].squeeze())
        ]
        assert same == [name], "the edit makes every weight another one"
        assert entry.data == "unet/edit.onnx_data"


def test_every_weight_of_the_unet_is_mapped_and_moved(wide: Path, weights: Weights, every: Edit) -> None:
    check_every_place(wide, weights, every)
    assert verify(wide) == []
    assert read_edit_id(wide / MODEL) == every.id
    assert not (wide / "unet/model.onnx_data").exists()


def test_it_computes_what_the_edited_torch_model_does(wide: Path, plain: Path, tiny_model: Path, every: Edit) -> None:
    unet = load_pipeline(tiny_model, every).unet
    states = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    inputs = make_inputs(unet, states)
    wanted = torch_outputs(unet, inputs)
    size = np.linalg.norm(wanted)
    assert np.linalg.norm(onnx_outputs(wide / MODEL, inputs) - wanted) < 1e-5 * size
    assert np.linalg.norm(onnx_outputs(plain / MODEL, inputs) - wanted) > 0.05 * size


@pytest.mark.slow
def test_every_weight_of_the_demo_model(demo_model: Path, tmp_path: Path) -> None:
    weights = parameters(demo_model)
    edit = delta_edit(weights, 3)
    export_pipeline(demo_model, tmp_path / "base")
    patch(tmp_path / "base", edit, out=tmp_path / "patched")
    check_every_place(tmp_path / "patched", weights, edit)


@pytest.mark.slow
def test_layer_norms_of_several_nodes(tiny_model: Path, weights: Weights, tmp_path: Path) -> None:
    """Before operator set 17 a layer norm is a subgraph, with a second Add."""
    edit = delta_edit(weights, 3)
    export_pipeline(tiny_model, tmp_path / "onnx", edit=edit, options=ExportOptions(opset=16))
    assert not any(node.op_type == "LayerNormalization" for node in onnx.load(tmp_path / "onnx" / MODEL).graph.node)
    check_every_place(tmp_path / "onnx", weights, edit)


# --- a patch equals a fresh export -----------------------------------------------------------------------------------


def check_equal(ours: Path, theirs: Path) -> None:
    """Every file is the same, and the manifests but for the parity that an export measures."""
    a, b = contents(ours), contents(theirs)
    del a[NAME], b[NAME]
    assert a == b
    one, other = (read_manifest(folder).model_copy(update={"parity": {}}) for folder in (ours, theirs))
    assert one == other


@pytest.mark.parametrize("which", ["some", pytest.param("every", marks=pytest.mark.slow)])
def test_a_patch_equals_a_fresh_export(
    which: str, request: pytest.FixtureRequest, tiny_model: Path, plain: Path, tmp_path: Path
) -> None:
    edit = request.getfixturevalue(which)
    before = contents(plain)
    export_pipeline(tiny_model, tmp_path / "fresh", edit=edit)
    patch(plain, edit, out=tmp_path / "patched")
    check_equal(tmp_path / "fresh", tmp_path / "patched")
    assert contents(plain) == before


def test_patched_from_another_edit_equals_patched_from_base(
    plain: Path, some: Edit, sites: tuple[str, ...], weights: Weights, tmp_path: Path
) -> None:
    text = random_edit({name: weights[name] for name in sites}, 1)
    patch(plain, text, out=tmp_path / "text")
    patch(tmp_path / "text", some, out=tmp_path / "both")
    patch(plain, some, out=tmp_path / "one")
    check_equal(tmp_path / "both", tmp_path / "one")
    patch(tmp_path / "both", text, out=tmp_path / "back")  # the values of the first, in the wider layout
    ours, theirs = initialisers(tmp_path / "back" / MODEL), initialisers(tmp_path / "text" / MODEL)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_plain_optimum_export(optimum: Path, every: Edit, wide: Path, tmp_path: Path) -> None:
    patch(optimum, every, out=tmp_path / "out")
    names = [f"unet/{file}" for file in ("model.onnx", "edit.onnx_data", "base.safetensors")]
    ours, theirs = contents(tmp_path / "out"), contents(wide)
    assert [ours[name] for name in names] == [theirs[name] for name in names]


def test_the_next_edit_is_one_small_file(wide: Path, weights: Weights, some: Edit, tmp_path: Path) -> None:
    patch(wide, some, out=tmp_path / "out")
    own = {name for name in contents(tmp_path / "out") if not os.path.samefile(tmp_path / "out" / name, wide / name)}
    assert own == {MODEL, "unet/edit.onnx_data", NAME}
    check = initialisers(tmp_path / "out" / MODEL)
    moved = some.apply(weights)
    for name, entry in read_manifest(tmp_path / "out").weights.items():
        values = moved.get(name, weights[name])
        np.testing.assert_array_equal(
            check[entry.initializer].squeeze(), (values.T if entry.transposed else values).squeeze()
        )


@pytest.mark.slow
def test_half_precision(tiny_model: Path, weights: Weights, some: Edit, tmp_path: Path) -> None:
    narrow, full = ExportOptions(dtype="fp16"), ExportOptions(dtype="fp16", editable="all")
    export_pipeline(tiny_model, tmp_path / "narrow", options=narrow)
    with pytest.raises(FingerprintMismatch, match=r"in float16 alone, .*or with editable: all"):
        patch(tmp_path / "narrow", some, out=tmp_path / "out")
    export_pipeline(tiny_model, tmp_path / "full", options=full)
    assert set(read_manifest(tmp_path / "full").weights) == set(weights)
    patch(tmp_path / "full", some, out=tmp_path / "out")
    export_pipeline(tiny_model, tmp_path / "fresh", edit=some, options=full)
    check_equal(tmp_path / "out", tmp_path / "fresh")


# --- at load time, and what the commands say -------------------------------------------------------------------------


def test_at_load_time(plain: Path, wide: Path, some: Edit, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"moves conv_in\.weight and 9 more, whose unedited values .*run excise patch"):
        OnnxRuntime(plain, edit=some)
    patch(wide, some, out=tmp_path / "out")
    request = [Request("a gun", seed=1)]
    ours, theirs, other = (
        runtime.denoise(request, num_inference_steps=2)
        for runtime in (OnnxRuntime(wide, edit=some), OnnxRuntime(tmp_path / "out"), OnnxRuntime(wide))
    )
    np.testing.assert_array_equal(ours, theirs)
    assert not np.allclose(ours, other)


def test_the_commands(
    plain: Path, tiny_model: Path, some: Edit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "esd.safetensors", tmp_path / "onnx"
    save_edit(file, some)
    assert main(["patch", str(plain), "--edit", str(file), "--out", str(out)]) == 0
    assert "10 more weights, such as conv_in.weight, to edit.onnx_data" in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 0
    assert some.id in capsys.readouterr().out
    sides = [f"torch:{tiny_model}?edit={file}", f"onnx:{out}", "--base", f"onnx:{plain}", "--edit", str(file)]
    short = ["--steps", "2", "--timesteps", "1", "--prompts", "1", "--json"]
    assert main(["verify", *sides, *short]) == 0
    sides[1] = f"onnx:{plain}"
    assert main(["verify", *sides, *short]) == 1  # the export without the edit


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_weight_that_isnt_there_is_refused_by_name(plain: Path, weights: Weights, tmp_path: Path) -> None:
    odd = {**weights, "mid_block.nowhere.weight": np.ones(4, np.float32)}
    with pytest.raises(FingerprintMismatch, match=r"for another model: .* has no mid_block\.nowhere\.weight"):
        patch(plain, delta_edit(odd, 1, ["conv_in.weight", "mid_block.nowhere.weight"]), out=tmp_path / "out")
    other = {**weights, "conv_in.weight": weights["conv_in.weight"] + 1}
    with pytest.raises(FingerprintMismatch, match="fingerprint differs"):
        patch(plain, delta_edit(other, 1, ["conv_in.weight"]), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_was_folded_is_refused_by_name(plain: Path, some: Edit, tmp_path: Path) -> None:
    folder = tmp_path / "folded"
    shutil.copytree(plain, folder)
    (folder / NAME).unlink()  # as a tool leaves it that knows nothing of it
    model = onnx.load(folder / MODEL, load_external_data=False)
    (node,) = [one for one in model.graph.node if one.name == "/down_blocks.0/resnets.0/norm1/Mul"]
    (tensor,) = [one for one in model.graph.initializer if one.name in node.input]
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    model.graph.initializer.remove(tensor)
    (folder / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(
        ArtefactError, match=r"^down_blocks\.0\.resnets\.0\.norm1\.weight is not in .* of an initialiser"
    ):
        patch(folder, some, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["folded"]


def test_a_weight_that_could_be_two_is_refused(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in (("w", 4), ("v", 4))]
    tensors += [numpy_helper.from_array(np.ones((4, 4), np.float32), "m"), numpy_helper.from_array(np.ones(1), "ε")]
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["y"], name="/a/Mul"),
        helper.make_node("Mul", ["y", "v"], ["z"], name="/a/Mul_1"),
        helper.make_node("Mul", ["x", "m"], ["u"], name="/b/Mul"),
        helper.make_node("Add", ["x", "ε"], ["t"], name="/c/Add"),
        helper.make_node("Add", ["t", "v"], ["s"], name="/c/Add_1"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xzus"]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], tensors)), path)
    graph = Graph(path)
    with pytest.raises(ArtefactError, match=r"a\.weight .*can't be told: /a/Mul reads w, and /a/Mul_1 v"):
        graph.locate("a.weight")
    with pytest.raises(ArtefactError, match=r"reads m of shape \(4, 4\), which isn't a vector"):
        graph.locate("b.weight")
    assert graph.locate("c.bias").initializer == "v"  # ε is one number


@pytest.mark.parametrize("file", [MODEL, "unet/model.onnx_data"])
def test_an_altered_folder_is_refused(plain: Path, some: Edit, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(plain, folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(ArtefactError, match="was altered"):
        patch(folder, some, out=tmp_path / "out", force=True)


def test_an_edit_whose_unedited_values_are_gone_is_refused(plain: Path, some: Edit, tmp_path: Path) -> None:
    folder = tmp_path / "carries"
    shutil.copytree(plain, folder)
    document = json.loads((folder / NAME).read_text())
    document["edit"] = {"id": "1", "summary": "an export before version 2", "sites": ["conv_in.weight"]}
    (folder / NAME).write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=r"also moved conv_in\.weight, whose unedited values weren't kept"):
        patch(folder, some, out=tmp_path / "out")


@pytest.mark.slow
def test_a_kill_leaves_the_old_model_or_the_new_one(plain: Path, some: Edit, tmp_path: Path) -> None:
    patch(plain, some, out=tmp_path / "new")
    old, new, seen = contents(plain), contents(tmp_path / "new"), set()
    work: Callable[[Path], Callable[[], object]] = lambda folder: lambda: patch(folder, some)  # noqa: E731
    for number in range(0, 1000, 3):
        folder = tmp_path / "served"
        shutil.copytree(plain, folder, copy_function=os.link)
        died = killed_at(number, work(folder))
        found = contents(folder)
        assert found in (old, new), f"a mixture at step {number}"
        seen.add(found == new)
        shutil.rmtree(folder)
        for path in tmp_path.glob(f"{PARTIAL}*"):
            shutil.rmtree(path)
        if not died:
            break
    assert seen == {False, True}
    assert contents(plain) == old


# --- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_the_layout_doesnt_depend_on_where_the_data_was(optimum: Path, tmp_path: Path, together: bool) -> None:
    """A model of over 2 GB comes in one file or a file a tensor; a smaller one in the graph's."""
    for name in ("embedded", "external"):
        (tmp_path / name).mkdir()
    shutil.copy(optimum / MODEL, tmp_path / "embedded")
    onnx.save(
        onnx.load(optimum / MODEL),
        tmp_path / "external" / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=together,
        location="model.onnx_data" if together else None,
        size_threshold=0,
    )
    for name in ("embedded", "external"):
        separate(tmp_path / name / "model.onnx", ["conv_in.weight", "conv_out.bias"])
    ours, theirs = contents(tmp_path / "embedded"), contents(tmp_path / "external")
    assert sorted(ours) == ["edit.onnx_data", "model.onnx", "model.onnx_data"]
    assert ours == theirs


def test_editable_all(tiny_model: Path, weights: Weights, wide: Path, every: Edit, tmp_path: Path) -> None:
    export_pipeline(tiny_model, tmp_path / "onnx", options=ExportOptions(editable="all"))
    entries = read_manifest(tmp_path / "onnx").weights
    assert set(map_weights(tmp_path / "onnx" / MODEL, weights)) == set(entries) == set(weights)
    patch(tmp_path / "onnx", every, out=tmp_path / "out")
    check_equal(tmp_path / "out", wide)
