"""Component-wise parity of families without a torch-free loop, and the errors that it has to catch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from excise.cli import main
from excise.editfile import Edit, save_edit
from excise.errors import FingerprintMismatch, NumericsError
from excise.export.component_parity import ComponentParity, component_parity
from excise.export.onnx_export import export_pipeline
from excise.export.patch import patch
from excise.export.pipeline import cross_attention, load_pipeline
from tests.edit import tiny_models
from tests.random_edits import random_edit

#: The tiny encoders' random weights are ten times the usual size, and multiply rounding (2.3e-5 was measured).
RELATIVE = 1e-4
PROMPTS = {"erased": ("a gun",), "kept": ("a cat", "a dog")}


@pytest.fixture(scope="module")
def model(folder_of: Callable[[Callable[[], Any]], Path]) -> Path:
    return folder_of(tiny_models.stable_diffusion_xl)


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, NDArray[Any]]:
    unet = load_pipeline(model).unet
    parameters = dict(unet.named_parameters())
    return {name: parameters[name].detach().numpy() for name in cross_attention(unet)}


@pytest.fixture(scope="module")
def edit(weights: dict[str, NDArray[Any]]) -> Edit:
    return random_edit(weights, 1)


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("xl") / "base"
    export_pipeline(model, out)
    return out


@pytest.fixture(scope="module")
def edited(base: Path, edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("xl") / "edited"
    patch(base, edit, out=out, link=False)
    return out


def measure(model: Path, folder: Path, edit: Edit) -> ComponentParity:
    return component_parity(
        model, folder, model, PROMPTS, edit=edit, timesteps=(501,), max_to_move=2e-3, max_relative=RELATIVE
    )


def failed(found: ComponentParity) -> set[str]:
    return {row.component for row in found.rows if not row.passed}


def test_every_component_is_compared(model: Path, edited: Path, edit: Edit) -> None:
    found = measure(model, edited, edit)
    assert found.passed
    assert {row.component for row in found.rows} == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
    assert {row.group for row in found.rows if row.component == "unet"} == {"erased", "kept"}
    assert all(row.to_move is not None for row in found.rows if row.component == "unet")
    assert all(row.moved == 0 for row in found.rows if row.component != "unet")
    assert {row.output for row in found.rows if row.component == "text_encoder_2"} >= {"text_embeds"}
    assert "the denoising loop" in found.not_compared
    json.dumps(found.dict(), allow_nan=False)


def test_an_export_without_the_edit_fails(model: Path, base: Path, edit: Edit) -> None:
    found = measure(model, base, edit)
    assert failed(found) == {"unet"}
    assert all(0.9 < (row.to_move or 0) < 1.1 for row in found.rows if row.component == "unet")


def test_another_edit_is_refused(model: Path, edited: Path, weights: dict[str, NDArray[Any]]) -> None:
    with pytest.raises(FingerprintMismatch, match="carries the edit"):
        measure(model, edited, random_edit(weights, 2))


def test_an_edit_that_moves_nothing_is_refused(model: Path, edited: Path, edit: Edit) -> None:
    with pytest.raises(NumericsError, match="moves nothing on the erased prompts"):
        component_parity(model, edited, model, PROMPTS, timesteps=(501,), max_to_move=2e-3, max_relative=RELATIVE)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae_decoder"])
@pytest.mark.parametrize("value", [1.5, pytest.param(np.nan, marks=pytest.mark.slow)])
def test_a_damaged_component_is_named(
    model: Path, edited: Path, edit: Edit, tmp_path: Path, component: str, value: float
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(edited, folder)
    path = folder / component / "model.onnx"
    damaged = onnx.load(path)
    largest = max(
        (one for one in damaged.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1),
        key=lambda one: np.prod(one.dims),
    )
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float32(value), largest.name))
    onnx.save(damaged, path)
    assert failed(measure(model, folder, edit)) == {component}


def test_the_command(
    model: Path, base: Path, edited: Path, edit: Edit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gun.safetensors"
    save_edit(file, edit)
    given = ["verify", f"torch:{model}?edit={file}", f"onnx:{edited}", "--base", f"torch:{model}", "--components"]
    given += ["--erased", "a gun", "--prompts", "1", "--timesteps", "1", "--max-relative", str(RELATIVE)]
    assert main([*given, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert main(given) == 0
    told = capsys.readouterr().out
    assert "not compared: vae_encoder, tokenizers, scheduler, the denoising loop, images" in told
    assert "unet" in told
    given[2] = f"onnx:{base}"
    assert main(given) == 1
    assert "FAILED" in capsys.readouterr().out
    given[2] = f"torch:{model}"
    assert main(given) == 2
    assert "--components compares torch:DIR with onnx:DIR" in capsys.readouterr().err
