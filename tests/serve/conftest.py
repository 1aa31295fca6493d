"""The tiny random pipeline, exported to ONNX once."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from excise.editfile import Edit
from excise.serve.onnx_runtime import OnnxRuntime
from tests.random_edits import random_edit


@pytest.fixture(scope="session")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as Optimum exports it."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, by the dozen
        from optimum.exporters.onnx import onnx_export_from_model

        pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
        onnx_export_from_model(pipeline, folder, task="text-to-image")
    return folder


@pytest.fixture(scope="session")
def runtime(exported: Path) -> OnnxRuntime:
    """The exported model, opened."""
    return OnnxRuntime(exported, threads=1)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test can break."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture(scope="session")
def edits(tiny_model: Path) -> tuple[Edit, Edit]:
    """Two edits of the tiny model."""
    weights = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    sites = {name: w for name, w in weights.items() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    return random_edit(sites, 1, scale=0.3), random_edit(sites, 2, scale=0.3)


@pytest.fixture(scope="session")
def versions(exported: Path, edits: tuple[Edit, Edit], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The export patched with each of the edits. Not to be changed by tests."""
    from excise.export.patch import patch

    first, second = (tmp_path_factory.mktemp("versions") / str(number) for number in range(2))
    patch(exported, edits[0], out=first)
    patch(first, edits[1], out=second)
    return first, second


@pytest.fixture(scope="session")
def vectors(versions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with a timestep of shape (1), as Triton's own backends take it. Not to be changed by tests."""
    from excise.export.vector_timestep import vector_timestep_folder

    first, second = (tmp_path_factory.mktemp("vectors") / str(number) for number in range(2))
    for folder, out in zip(versions, (first, second), strict=True):
        vector_timestep_folder(folder, out)
    return first, second
