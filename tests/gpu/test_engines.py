"""Engines that run: what they compute, and that a refit is what a build with the edit would have been.

ONNX Runtime on the CPU is the oracle. Everything here needs a GPU and one of the two libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from excise.edited_initializers import edited_initializers
from excise.editfile import Edit
from excise.enginefile import ENGINE, check_engine, network_name, read_engine
from excise.errors import ArtefactError, MissingExtra
from excise.export.engine_execution import EngineExecution
from excise.export.engine_library import EngineLibrary, gpu_capability, load_library
from excise.export.engine_options import PipelineOptions
from excise.export.engine_pipeline import build_engines
from excise.export.onnx_export import export_pipeline
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline, read_weights
from excise.export.refit import refit
from excise.export.refit_plan import RefitPlan, execute, refit_plan
from excise.manifest import read_manifest, verify
from tests.random_edits import random_edit

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run on a GPU")
OPTIONS = PipelineOptions(tf32=False)
#: Of float32 sums in another order; not yet measured on a GPU.
TOLERANCE = 1e-3
#: Of a refit, relative to the edit's movement; not yet measured on a GPU either.
TOLERANCES = {"fp32": 0.01, "fp16": 0.05}


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def library(request: pytest.FixtureRequest) -> EngineLibrary:
    try:
        loaded = load_library(request.param)
    except MissingExtra as missing:
        pytest.skip(str(missing))
    gpu = gpu_capability()
    if gpu and not loaded.runs_on(gpu):
        pytest.skip(f"{request.param} doesn't run on this GPU, {gpu}: not run on a GPU")
    return loaded


@pytest.fixture(scope="module")
def onnx(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model exported without an edit. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("engines") / "plain"
    export_pipeline(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def edits(tiny_model: Path, onnx: Path) -> tuple[Edit, Edit]:
    weights = read_weights(load_pipeline(tiny_model).unet, sorted(read_manifest(onnx).weights))
    copies = {name: np.array(values) for name, values in weights.items()}
    return random_edit(copies, 1), random_edit(copies, 2)


@pytest.fixture(scope="module")
def engines(onnx: Path, library: EngineLibrary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with refittable engines of the unedited model."""
    out = tmp_path_factory.mktemp("engines") / library.name
    build_engines(onnx, library, OPTIONS.model_copy(update={"refit": True}), out=out)
    return out


def inputs() -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(0)
    return {
        "sample": generator.standard_normal((2, 4, 8, 8)).astype(np.float32),
        "timestep": np.array(500.0, np.float32),
        "encoder_hidden_states": generator.standard_normal((2, 24, 32)).astype(np.float32),
    }


def expected(folder: Path) -> NDArray[Any]:
    """The UNet's output by ONNX Runtime on the CPU."""
    session = onnxruntime.InferenceSession(str(folder / "unet/model.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["out_sample"], inputs())[0])


def opened(engine: Path, library: EngineLibrary) -> tuple[Any, Any]:
    """The engine, and the runtime that has to live as long."""
    runtime = library.module.Runtime(library.logger)
    made = runtime.deserialize_cuda_engine(engine.read_bytes())
    assert made is not None
    return made, runtime


def computed(engine: Any) -> NDArray[Any]:
    """The UNet's output by an engine."""
    context = engine.create_execution_context()
    tensors = {name: torch.from_numpy(values).cuda() for name, values in inputs().items()}
    for name, tensor in tensors.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
        assert context.set_tensor_address(name, tensor.data_ptr())
    output = torch.empty(tuple(context.get_tensor_shape("out_sample")), device="cuda")
    assert context.set_tensor_address("out_sample", output.data_ptr())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return output.cpu().numpy()


def difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Relative, in the Frobenius norm."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def plan_of(engines: Path, onnx: Path, edit: Edit | None) -> RefitPlan:
    """What puts an edit into the folder's UNet engine."""
    entry = read_engine(engines / "unet" / ENGINE)
    values = edited_initializers(onnx, read_manifest(onnx), edit)
    return refit_plan(entry.refittable, {name: array for name, _, array in values})


@needs_gpu
def test_an_engine_computes_what_its_onnx_file_does(onnx: Path, library: EngineLibrary, tmp_path: Path) -> None:
    entries = build_engines(onnx, library, OPTIONS, out=tmp_path / "out")
    engine, _runtime = opened(tmp_path / "out" / "unet" / ENGINE, library)
    assert engine.name == network_name(None, refittable=False)
    assert not engine.refittable
    assert difference(computed(engine), expected(onnx)) < TOLERANCE
    for name, ranges in entries["unet"].profiles[0].items():
        low, best, high = engine.get_tensor_profile_shape(name, 0)
        assert (tuple(low), tuple(best), tuple(high)) == (ranges.min, ranges.opt, ranges.max)
    if library.name == "tensorrt":
        assert entries["unet"].compute_capabilities == (gpu_capability(),)


@needs_gpu
def test_a_refit_is_a_build_with_the_edit(
    engines: Path, onnx: Path, edits: tuple[Edit, Edit], library: EngineLibrary, tmp_path: Path
) -> None:
    engine, _runtime = opened(engines / "unet" / ENGINE, library)
    before = computed(engine)
    assert difference(before, expected(onnx)) < TOLERANCE, "right before any refit"
    patch(onnx, edits[0], out=tmp_path / "patched")
    wanted = expected(tmp_path / "patched")
    assert difference(before, wanted) > 10 * TOLERANCE, "the edit moves the output"
    execute(plan_of(engines, onnx, edits[0]), engine, library)
    assert difference(computed(engine), wanted) < TOLERANCE


@needs_gpu
def test_there_and_back_leaves_nothing(
    engines: Path, onnx: Path, edits: tuple[Edit, Edit], library: EngineLibrary
) -> None:
    engine, _runtime = opened(engines / "unet" / ENGINE, library)
    outputs = []
    for edit in (edits[0], edits[1], edits[0], None):
        execute(plan_of(engines, onnx, edit), engine, library)
        outputs.append(computed(engine))
    assert difference(outputs[1], outputs[0]) > 10 * TOLERANCE
    assert difference(outputs[2], outputs[0]) < TOLERANCE
    assert difference(outputs[3], expected(onnx)) < TOLERANCE


@needs_gpu
def test_an_engine_runs_as_its_context_does(engines: Path, library: EngineLibrary) -> None:
    engine, _runtime = opened(engines / "unet" / ENGINE, library)
    np.testing.assert_array_equal(EngineExecution(engine, library)(inputs()), computed(engine))


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_refitted_folder_is_the_patched_one_with_its_engine(
    dtype: Literal["fp32", "fp16"], tiny_model: Path, edits: tuple[Edit, Edit], library: EngineLibrary, tmp_path: Path
) -> None:
    export_pipeline(tiny_model, tmp_path / "plain", dtype=dtype)
    folder = tmp_path / "engines"
    build_engines(tmp_path / "plain", library, OPTIONS.model_copy(update={"refit": True}), out=folder)
    for edit in (edits[0], edits[1], edits[0]):
        done = refit(folder, edit, library)
        assert done.parity.relative < TOLERANCES[dtype]
        assert done.entry.edit == edit.id
        assert check_engine(folder / "unet" / ENGINE) == verify(folder) == []
    patch(tmp_path / "plain", edits[0], out=tmp_path / "patched")
    engine, _runtime = opened(folder / "unet" / ENGINE, library)
    assert engine.refittable
    if dtype == "fp32":
        assert difference(computed(engine), expected(tmp_path / "patched")) < TOLERANCE


@needs_gpu
def test_an_engine_that_kept_its_weights_is_refused(
    engines: Path, edits: tuple[Edit, Edit], library: EngineLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("excise.export.refit.execute", lambda plan, engine, library: None)
    with pytest.raises(ArtefactError, match="of the edit's own movement away from the patched ONNX model"):
        refit(engines, edits[0], library, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
