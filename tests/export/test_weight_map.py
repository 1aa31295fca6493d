"""The weight map: complete, right in every value, refused for another model, unmoved by equal weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from excise.errors import ArtefactError
from excise.export.onnx_graph import Graph, node_prefix
from excise.export.pipeline import load_pipeline, read_weights
from excise.export.weight_map import array_sha256, map_weights, unshare

K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
MID_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
MID_V = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
ATTN1_K = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"


def external(path: Path, folder: Path) -> Path:
    """A copy of an ONNX file with its weights in ``model.onnx_data``, as Optimum writes models over 2 GB."""
    folder.mkdir()
    target = folder / "model.onnx"
    onnx.save(onnx.load(path), target, save_as_external_data=True, location="model.onnx_data", size_threshold=100)
    assert (folder / "model.onnx_data").stat().st_size > 900_000
    return target


@pytest.fixture(scope="module")
def values(tiny_model: Path, sites: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The unedited weights, each (o, d)."""
    return read_weights(load_pipeline(tiny_model).unet, sites)


@pytest.fixture(scope="module")
def twins(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, NDArray[Any]]]:
    """A UNet's raw export in which mid to_k equals down to_k and mid attn1 to_k is mid to_v, and its weights."""
    from excise.export.components import export_components
    from excise.export.options import ExportOptions

    pipe = load_pipeline(tiny_model)
    parameters = dict(pipe.unet.named_parameters())
    parameters[MID_K].data.copy_(parameters[K].data)
    parameters[ATTN1_K].data.copy_(parameters[MID_V].data)
    weights = {name: np.array(array) for name, array in read_weights(pipe.unet, [K, MID_K, MID_V]).items()}
    folder = tmp_path_factory.mktemp("twins")
    export_components(pipe, folder, ExportOptions(), lambda message: None)
    return folder / "unet" / "model.onnx", weights


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        (K, "/down_blocks.1/attentions.0/transformer_blocks.0/attn2/to_k/"),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
            "/mid_block/attentions.0/transformer_blocks.0/attn2/to_out.0/",
        ),
        ("conv_in.weight", "/conv_in/"),
    ],
)
def test_node_paths(name: str, prefix: str) -> None:
    assert node_prefix(name) == prefix


@pytest.mark.parametrize("name", ["weight", "conv_in", "conv_in.scale", ""])
def test_what_is_not_a_weight_has_no_path(name: str) -> None:
    with pytest.raises(ArtefactError, match="is not a weight or bias"):
        node_prefix(name)


def test_every_edited_weight_is_found_with_its_values(edited: Path, edit: Any, values: dict[str, NDArray[Any]]) -> None:
    moved = edit.apply(values)
    entries = map_weights(edited / "unet" / "model.onnx", moved)
    assert set(entries) == set(edit.sites)
    assert len({entry.initializer for entry in entries.values()}) == len(edit.sites)
    model = onnx.load(edited / "unet" / "model.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    for name, entry in entries.items():
        assert nodes[entry.node].input[1] == entry.initializer
        assert nodes[entry.node].input[0] == "encoder_hidden_states"
        assert entry.transposed
        found = tensors[entry.initializer]
        np.testing.assert_array_equal(found.T, moved[name])
        assert (entry.dtype, entry.shape, entry.sha256) == ("float32", found.shape, array_sha256(found))


def test_other_weights_map_too(plain: Path, tiny_model: Path) -> None:
    names = [
        "conv_in.weight",
        "conv_in.bias",
        "time_embedding.linear_1.weight",
        "time_embedding.linear_1.bias",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
    ]
    entries = map_weights(plain / "unet" / "model.onnx", read_weights(load_pipeline(tiny_model).unet, names))
    assert [entry.transposed for entry in entries.values()] == [False, False, False, False, True, True, True]


def test_an_export_without_the_edit_is_rejected(
    plain: Path, edited: Path, edit: Any, values: dict[str, NDArray[Any]]
) -> None:
    with pytest.raises(ArtefactError, match=r"attn2\.to_[kv]\.weight is not in .*holds other values \(largest diff"):
        map_weights(plain / "unet" / "model.onnx", edit.apply(values))
    with pytest.raises(ArtefactError, match="holds other values"):
        map_weights(edited / "unet" / "model.onnx", values)


def test_the_node_decides_and_not_the_values(plain: Path, values: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    entries = map_weights(plain / "unet" / "model.onnx", values)
    swapped = {MID_K: values[MID_V], MID_V: values[MID_K]}
    with pytest.raises(ArtefactError, match=f"{entries[MID_V].initializer} holds these"):
        map_weights(plain / "unet" / "model.onnx", swapped)
    with pytest.raises(ArtefactError, match=r"has shape \(32, 32\), not \(32, 8\)"):
        map_weights(plain / "unet" / "model.onnx", {MID_K: values[MID_K][:8]})


def test_a_missing_node_is_named(plain: Path, values: dict[str, NDArray[Any]]) -> None:
    with pytest.raises(
        ArtefactError, match=r"^mid_block\.nowhere\.weight is not in .*: no node /mid_block/nowhere/MatMul"
    ):
        map_weights(plain / "unet" / "model.onnx", {"mid_block.nowhere.weight": values[MID_K]})


@pytest.mark.parametrize("is_external", [False, True])
def test_equal_weights_are_told_apart(
    twins: tuple[Path, dict[str, NDArray[Any]]], tmp_path: Path, is_external: bool
) -> None:
    source, weights = twins
    if is_external:
        path = external(source, tmp_path / "external")
    else:
        path = Path(shutil.copy(source, tmp_path / "model.onnx"))
    with pytest.raises(ArtefactError, match="can't be changed alone"):
        map_weights(path, weights)
    before = Graph(path)
    assert unshare(path) > 2
    assert unshare(path) == 0
    onnx.checker.check_model(str(path))
    entries = map_weights(path, weights)
    assert len({entry.initializer for entry in entries.values()}) == 3
    assert entries[K].sha256 == entries[MID_K].sha256
    for name, entry in entries.items():
        assert entry.node == before.locate(name).node
    # Changing one leaves the other.
    model = onnx.load(path, load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.name == entries[MID_K].initializer)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    path.write_bytes(model.SerializeToString())
    map_weights(path, {K: weights[K], MID_K: np.zeros_like(weights[MID_K]), MID_V: weights[MID_V]})


def test_unsharing_keeps_the_names_of_other_exports(
    twins: tuple[Path, dict[str, NDArray[Any]]], plain: Path, values: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    source, weights = twins
    path = Path(shutil.copy(source, tmp_path / "model.onnx"))
    unshare(path)
    usual = map_weights(plain / "unet" / "model.onnx", values)
    assert {n: e.initializer for n, e in map_weights(path, weights).items()} == {
        n: usual[n].initializer for n in weights
    }


def test_unsharing_changes_no_output(twins: tuple[Path, dict[str, NDArray[Any]]], tmp_path: Path) -> None:
    from excise.export.parity import DenoiserInputs, onnx_outputs

    source, _ = twins
    path = Path(shutil.copy(source, tmp_path / "model.onnx"))
    unshare(path)
    random = np.random.default_rng(0)
    states = random.standard_normal((1, 24, 32), np.float32)
    inputs = DenoiserInputs(random.standard_normal((1, 4, 8, 8), np.float32), (401,), states)
    np.testing.assert_array_equal(onnx_outputs(path, inputs), onnx_outputs(source, inputs))


def test_external_data_is_read_and_its_loss_is_an_error(
    optimum: Path, values: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    path = external(optimum / "unet" / "model.onnx", tmp_path / "external")
    there = {"data": "unet/model.onnx_data", "offset": 0}
    assert {n: e.model_copy(update=there) for n, e in map_weights(path, values).items()} == {
        n: e.model_copy(update=there) for n, e in map_weights(optimum / "unet" / "model.onnx", values).items()
    }
    (path.parent / "model.onnx_data").unlink()
    with pytest.raises(ArtefactError, match="can't be read"):
        map_weights(path, values)


@pytest.mark.parametrize(("trans", "transposed"), [(0, True), (1, False)])
def test_gemm_and_transpose_nodes_are_followed(trans: int, transposed: bool, tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = weight.T if transposed else weight
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["y"], name="/a/Gemm", transB=trans),
        helper.make_node("Transpose", ["u"], ["ut"], name="/t", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "ut"], ["z"], name="/b/MatMul"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "yz"]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(stored), "w"), numpy_helper.from_array(weight * 2, "u")]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, tensors)), path)
    entries = map_weights(path, {"a.weight": weight, "b.weight": weight * 2})
    assert entries["a.weight"].transposed is transposed
    assert entries["b.weight"].transposed is False
    with pytest.raises(ArtefactError, match="only /a/Gemm"):
        Graph(path).locate("a.bias")


def test_what_is_not_onnx_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="doesn't exist"):
        Graph(tmp_path / "model.onnx")
    for content in (b"", b"junk junk junk"):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(ArtefactError, match="isn't an ONNX model"):
            Graph(tmp_path / "model.onnx")
