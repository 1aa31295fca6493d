"""Images of another size than the model's own: as diffusers makes them, or refused before anything is computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import UsageError
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request, initial_latents, requested_size

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",
)

#: The tiny model's own is 16 x 16, of latents 8 x 8 that its UNet halves once.
HEIGHT, WIDTH = 24, 8
SIZED = [Request("a gun", seed=1, height=HEIGHT, width=WIDTH), Request("a cat", "blue", 2, height=HEIGHT, width=WIDTH)]
SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0}


def test_the_size_that_all_ask_for() -> None:
    assert requested_size([], (512, 512), 8) == (512, 512)
    assert requested_size([Request("a"), Request("b")], (512, 512), 8) == (512, 512)
    assert requested_size([Request("a", height=384)], (512, 512), 8) == (384, 512)
    # What is the model's own may be named, whatever it is a multiple of.
    assert requested_size([Request("a"), Request("b", height=12, width=12)], (12, 12), 8) == (12, 12)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([Request("a"), Request("b", height=384)], "one call can't give images of 512 x 384 and 512 x 512 pixels"),
        ([Request("a", width=500)], "images of 500 x 512 pixels: this model's sides are multiples of 8"),
        ([Request("a", height=0, width=8)], "images of 8 x 0 pixels"),
        ([Request("a", height=-8)], "images of 512 x -8 pixels"),
    ],
)
def test_sizes_that_can_not_be(requests: list[Request], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        requested_size(requests, (512, 512), 8)


def test_an_export_with_free_shapes_is_diffusers_at_another_size(runtime: OnnxRuntime, tiny_model: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        [request.prompt for request in SIZED],
        negative_prompt=[request.negative_prompt for request in SIZED],
        height=HEIGHT,
        width=WIDTH,
        latents=torch.from_numpy(initial_latents(SIZED, (4, HEIGHT // 2, WIDTH // 2))),
        output_type="pil",
        **SETTINGS,
    ).images
    images = runtime.generate(SIZED, **SETTINGS)
    assert images.shape == (2, HEIGHT, WIDTH, 3)
    assert np.abs(images.astype(int) - np.stack([np.asarray(image) for image in expected])).max() <= 1
    assert images.std() > 1
    assert runtime.denoise(SIZED, **SETTINGS).shape == (2, 4, HEIGHT // 2, WIDTH // 2)
    # Without a size there is the model's own, as before.
    assert runtime.generate([Request("a gun", seed=1)], **SETTINGS).shape == (1, 16, 16, 3)


def test_sizes_that_an_export_can_not_make(runtime: OnnxRuntime) -> None:
    with pytest.raises(UsageError, match="images of 18 x 16 pixels: this model's sides are multiples of 4"):
        runtime.generate([Request("a gun", width=18)])
    with pytest.raises(UsageError, match="one call can't give images of 16 x 16 and 16 x 24 pixels"):
        runtime.generate([Request("a gun"), Request("a gun", height=24)])
    with pytest.raises(UsageError, match="images of 18 x 16 pixels"):
        runtime.start([Request("a gun", width=18)], num_inference_steps=2, guidance_scale=5.0)


def test_an_export_of_one_size_says_so(exported: Path, tmp_path: Path) -> None:
    import onnx

    folder = Path(shutil.copytree(exported, tmp_path / "fixed"))
    for part, name in (("unet", "sample"), ("vae_decoder", "latent_sample")):
        model = onnx.load(folder / part / "model.onnx")
        (latents,) = [one for one in model.graph.input if one.name == name]
        for axis in (2, 3):
            latents.type.tensor_type.shape.dim[axis].dim_value = 8
        onnx.save(model, folder / part / "model.onnx")
    fixed = OnnxRuntime(folder, threads=1)
    assert fixed.generate([Request("a gun", height=16, width=16)], num_inference_steps=1).shape == (1, 16, 16, 3)
    with pytest.raises(UsageError, match="exported for images of 16 x 16 pixels alone, not of 16 x 24: ask for that"):
        fixed.generate([Request("a gun", height=24)], num_inference_steps=1)
