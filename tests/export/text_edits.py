"""Exported models with edits, run by ONNX Runtime: what the tests of edits on the text compare."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from excise.editfile import Edit
from excise.export.onnx_graph import Graph
from excise.export.pipeline import load_pipeline
from excise.onnx_metadata import EDIT_ID
from tests.export.unet_parity import text_states

UNET = "unet/model.onnx"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def inputs_of(model: Path, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
    """A UNet's inputs for prompts, with latents from a seed."""
    pipe = load_pipeline(model)
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    return {
        "sample": np.random.default_rng(0).standard_normal((len(prompts), channels, side, side), np.float32),
        "timestep": np.array(401.0, np.float32),
        "encoder_hidden_states": text_states(pipe, prompts),
    }


def outputs(path: Path, inputs: dict[str, NDArray[Any]], index: Sequence[int] | None = None) -> NDArray[np.float32]:
    """The first output, float32; ``index`` is a bank's ``edit_index``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = inputs if index is None else {**inputs, "edit_index": np.array(index, np.int64)}
    types = {one.name: _TYPES[one.type] for one in session.get_inputs()}
    found = session.run(None, {name: np.asarray(value, types[name]) for name, value in given.items()})[0]
    return np.asarray(found, np.float32)


def in_one_file(folder: Path, target: Path) -> Path:
    """A copy of an export whose UNet is one file, as Optimum writes models below 2 GB."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.onnx_data", "excise.json"))
    (target / UNET).unlink()
    graph = Graph(folder / UNET)
    for name, tensor in graph.initializers.items():
        tensor.CopyFrom(numpy_helper.from_array(graph.values(name), name))
    (target / UNET).write_bytes(graph.model.SerializeToString())
    return target


def weights_of(path: Path, edit: Edit) -> dict[str, NDArray[Any]]:
    """The weights that an edit moves, each (o, d)."""
    graph = Graph(path)
    places = {site: graph.locate(site) for site in edit.sites}
    values = {site: graph.values(place.initializer) for site, place in places.items()}
    return {site: np.ascontiguousarray(values[site].T if p.transposed else values[site]) for site, p in places.items()}


def bake(path: Path, edit: Edit, target: Path) -> Path:
    """The model with an edit in its weights, and its id."""
    graph = Graph(path)
    for site, values in edit.apply(weights_of(path, edit)).items():
        place = graph.locate(site)
        stored = np.ascontiguousarray(values.T if place.transposed else values)
        graph.initializers[place.initializer].CopyFrom(numpy_helper.from_array(stored, place.initializer))
    graph.model.metadata_props.add(key=EDIT_ID, value=edit.id)
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(graph.model.SerializeToString())
    return target


def baked_outputs(
    path: Path, edits: Sequence[Edit], inputs: dict[str, NDArray[Any]], folder: Path
) -> NDArray[np.float32]:
    """Outputs of the model and of the model with each edit in its weights, shape (1 + edits, batch, …)."""
    models = [path, *(bake(path, edit, folder / f"baked-{number}.onnx") for number, edit in enumerate(edits))]
    return np.stack([outputs(model, inputs) for model in models])


def half(source: Path, target: Path, *, keep_io_types: bool = False) -> Path:
    """The model in float16, by ONNX Runtime's converter."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep_io_types), target)
    return target
