"""An ONNX file's metadata without the onnx package: read and written as the package does, everything else kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from excise.errors import ArtefactError
from excise.onnx_metadata import EDIT_ID, read_edit_id, read_metadata, write_metadata


def model(metadata: dict[str, str]) -> onnx.ModelProto:
    """y = x W with a weight of a few kilobytes."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32), "W")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 40])],
        [weight],
    )
    made = helper.make_model(graph, producer_name="a test", doc_string="words")
    helper.set_model_props(made, metadata)
    return made


texts = st.text(max_size=200)


@given(before=st.dictionaries(texts, texts, max_size=4), entries=st.dictionaries(texts, texts, max_size=3))
def test_written_as_the_package_would(
    tmp_path_factory: pytest.TempPathFactory, before: dict[str, str], entries: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("metadata")
    made = model(before)
    onnx.save(made, folder / "a.onnx")
    assert read_metadata(folder / "a.onnx") == before
    write_metadata(folder / "a.onnx", folder / "b.onnx", entries)
    assert read_metadata(folder / "b.onnx") == before | entries
    found = onnx.load(folder / "b.onnx")
    assert {entry.key: entry.value for entry in found.metadata_props} == before | entries
    del found.metadata_props[:], made.metadata_props[:]
    assert found == made


def test_the_edit_id_is_replaced_and_not_added(tmp_path: Path) -> None:
    onnx.save(model({"kept": "yes"}), tmp_path / "0.onnx")
    assert read_edit_id(tmp_path / "0.onnx") is None
    for number, value in enumerate(("a" * 64, "b" * 64)):
        write_metadata(tmp_path / f"{number}.onnx", tmp_path / f"{number + 1}.onnx", {EDIT_ID: value})
        assert read_edit_id(tmp_path / f"{number + 1}.onnx") == value
    assert [entry.key for entry in onnx.load(tmp_path / "2.onnx").metadata_props] == ["kept", EDIT_ID]
    assert (tmp_path / "1.onnx").stat().st_size == (tmp_path / "2.onnx").stat().st_size


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path, share: float) -> None:
    onnx.save(model({EDIT_ID: "a" * 64}), tmp_path / "whole.onnx")
    data = (tmp_path / "whole.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ArtefactError, match="isn't an ONNX model, or is cut off"):
        read_metadata(tmp_path / "cut.onnx")


@given(st.binary(max_size=300))
def test_noise_is_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "n.onnx"
    path.write_bytes(data + b"\xff")
    with pytest.raises(ArtefactError):
        read_metadata(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="doesn't exist"):
        read_metadata(tmp_path / "none.onnx")
