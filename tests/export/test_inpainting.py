"""A UNet for inpainting, which also reads a mask and a masked image, is exported and patched as others are."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import onnx
import pytest

from excise.errors import ModelError
from excise.export.onnx_export import export_pipeline
from excise.export.parity import onnx_outputs, torch_outputs
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline
from excise.manifest import read_manifest, verify
from excise.serve.onnx_runtime import OnnxRuntime
from tests.edit import tiny_models
from tests.export.delta_edits import delta_edit
from tests.export.test_delta_edits import check_equal, parameters
from tests.export.unet_parity import make_inputs
from tests.random_edits import random_edit


def inpainting() -> diffusers.StableDiffusionInpaintPipeline:
    """4 channels of latents, 4 of the masked image and the mask."""
    parts = tiny_models.stable_diffusion(in_channels=9, out_channels=4, sample_size=8).components
    return diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(inpainting, tmp_path_factory.mktemp("inpainting") / "model")


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inpainting") / "onnx"
    export_pipeline(model, out)
    return out


def test_it_is_exported_with_its_nine_channels_and_patched(model: Path, base: Path, tmp_path: Path) -> None:
    weights = parameters(model)
    read = {name: values for name, values in weights.items() if ".attn2.to_k." in name or ".attn2.to_v." in name}
    edit = random_edit(read, 1)
    patch(base, edit, out=tmp_path / "patched")
    (sample,) = [
        value
        for value in onnx.load(base / "unet/model.onnx", load_external_data=False).graph.input
        if value.name == "sample"
    ]
    assert sample.type.tensor_type.shape.dim[1].dim_value == 9 or sample.type.tensor_type.shape.dim[1].dim_param
    states = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)
    unet, edited = load_pipeline(model).unet, load_pipeline(model, edit).unet
    inputs = make_inputs(unet, states)
    assert inputs.sample.shape == (2, 9, 8, 8)
    before, after = torch_outputs(unet, inputs), torch_outputs(edited, inputs)
    moved = np.linalg.norm(after - before)
    assert np.linalg.norm(onnx_outputs(base / "unet/model.onnx", inputs) - before) < 1e-3 * moved
    assert np.linalg.norm(onnx_outputs(tmp_path / "patched/unet/model.onnx", inputs) - after) < 1e-3 * moved


def test_a_patch_of_the_first_convolution_equals_a_fresh_export(model: Path, base: Path, tmp_path: Path) -> None:
    edit = delta_edit(parameters(model), 1, ["conv_in.weight", "mid_block.attentions.0.norm.weight"])
    assert edit.tensors["delta.conv_in.weight"].shape[1] == 9
    export_pipeline(model, tmp_path / "fresh", edit=edit)
    patch(base, edit, out=tmp_path / "patched")
    check_equal(tmp_path / "fresh", tmp_path / "patched")
    manifest = read_manifest(tmp_path / "fresh")
    assert manifest.base.pipeline == "StableDiffusionInpaintPipeline"
    assert manifest.parity["unet_relative"] < 1e-3
    assert verify(tmp_path / "patched") == []


def test_the_runtime_says_that_it_doesnt_inpaint(base: Path) -> None:
    with pytest.raises(ModelError, match=r"in_channels=9, the VAE 4 latent channels: inpainting .* aren't supported"):
        OnnxRuntime(base)
