"""The tiny random pipeline, exported to ONNX once."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

from excise.serve.onnx_runtime import OnnxRuntime


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
