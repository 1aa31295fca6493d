"""External data of many files, as PyTorch writes models of over 2 GB, becomes one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from excise.errors import ArtefactError
from excise.export.layout import MODEL, REST, gather

WIDTH = 40


def scattered(folder: Path) -> Path:
    """y = (x W + b) C with a large weight, a small bias and a large constant in a node, each in a file of its own."""
    random = np.random.default_rng(0)
    arrays = {
        "weight": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "bias": random.standard_normal(WIDTH).astype(np.float32),
    }
    constant = numpy_helper.from_array(random.standard_normal((WIDTH, WIDTH)).astype(np.float32), "constant")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("MatMul", ["x", "weight"], ["xw"]),
        helper.make_node("Add", ["xw", "bias"], ["xwb"]),
        helper.make_node("MatMul", ["xwb", "c"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:], initializers),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    path = folder / MODEL
    options = {"save_as_external_data": True, "all_tensors_to_one_file": False, "size_threshold": 0}
    onnx.save(model, path, **options, convert_attribute=True)
    return path


def output(path: Path) -> np.ndarray:
    x = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def test_values_stay_and_files_become_one(tmp_path: Path) -> None:
    path = scattered(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4, "a file for each of three tensors"
    before = output(path)
    gather(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [MODEL, REST]
    np.testing.assert_array_equal(output(path), before)
    onnx.checker.check_model(str(path))


def test_small_tensors_are_in_the_graphs_file(tmp_path: Path) -> None:
    path = scattered(tmp_path)
    gather(path)
    inside = {one.name: bool(one.raw_data) for one in onnx.load(path, load_external_data=False).graph.initializer}
    assert inside == {"weight": False, "bias": True}


@pytest.mark.parametrize("external", [False, True])
def test_one_file_is_left_alone(external: bool, tmp_path: Path) -> None:
    model = onnx.load(scattered(tmp_path))
    folder = tmp_path / "one"
    folder.mkdir()
    onnx.save(model, folder / MODEL, save_as_external_data=external, location=REST, size_threshold=0)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    gather(folder / MODEL)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    path = scattered(tmp_path)
    (tmp_path / "weight").unlink()
    with pytest.raises(ArtefactError, match="weight is missing"):
        gather(path)
