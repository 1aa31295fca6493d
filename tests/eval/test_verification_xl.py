"""SDXL by PyTorch is the pipeline's own, and verify's whole loop passes the right export of it and no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from excise.editfile import Edit, save_edit
from excise.errors import ModelError, PromptTooLong, UsageError
from excise.eval.runtimes import open_runtime, parse_runtime
from excise.eval.torch_runtime import TorchRuntime
from excise.eval.verification import Verification, verify
from excise.eval.verification_measures import Settings
from excise.eval.verification_prompts import Prompts
from excise.eval.verification_sides import open_side, parse_side, precision
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline
from excise.serve.runtime import Request
from tests.serve.tiny_xl import edit_of, load, model_and_export, own_call

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers' Euler scheduler calls np.array(torch.Tensor)
)

PROMPTS = Prompts({"erased": ("gun", "a gun"), "kept": ("cat",), "neutral": ("",)}, "the test")
SETTINGS = Settings(num_inference_steps=2, guidance_scale=5.0, timesteps=2)
REQUESTS = [Request("a gun", seed=1), Request("a cat", "a dog", seed=2), Request("", seed=3)]
LOOP: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_export(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def edit(model: Path) -> Edit:
    return edit_of(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_export(tmp_path_factory)[1]


@pytest.fixture(scope="module")
def edited(plain: Path, edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("xl") / "edited"
    patch(plain, edit, out=out)
    return out


@pytest.fixture(scope="module")
def verified(model: Path, edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path | str], Verification]:
    file = tmp_path_factory.mktemp("edit") / "gun.safetensors"
    save_edit(file, edit)

    def run(b: Path | str) -> Verification:
        sides = [parse_side(text) for text in (f"torch:{model}?edit={file}", str(b), f"torch:{model}")]
        return verify(*sides, PROMPTS, SETTINGS, load_pipeline)

    return run


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    return load(model)


def test_images_are_the_pipelines(pipeline: Any) -> None:
    runtime = TorchRuntime(pipeline, name="xl")
    latents = runtime.denoise(REQUESTS, **LOOP)
    wanted = np.stack([own_call(pipeline, request, "latent", **LOOP) for request in REQUESTS])
    np.testing.assert_allclose(latents, wanted, atol=1e-4 * np.abs(wanted).max())
    images = runtime.generate(REQUESTS, **LOOP)
    assert images.shape == (3, 16, 16, 3)
    shown = np.stack([own_call(pipeline, request, "pil", **LOOP) for request in REQUESTS])
    assert np.abs(images.astype(int) - shown).max() <= 1


def test_the_loop_of_excise_is_the_pipelines(pipeline: Any) -> None:
    """``encode``, ``predict`` and the sizes, by a guidance that takes excise's own loop."""
    from excise.serve.guidance import ClassifierFree

    ours = TorchRuntime(pipeline, name="xl", guidance=ClassifierFree())
    own = TorchRuntime(pipeline, name="xl", batch_size=2)
    latents = own.denoise(REQUESTS, **LOOP)
    np.testing.assert_allclose(ours.denoise(REQUESTS, **LOOP), latents, atol=1e-4 * np.abs(latents).max())
    assert own.encode(["a gun"]).shape == (1, 24, 56)
    with pytest.raises(UsageError, match="give text_embeds"):
        own.predict(latents, 5.0, own.encode([""] * 3))
    with pytest.raises(PromptTooLong, match="32 tokens, where the text encoder reads 24"):
        own.generate([Request("cat " * 30)])


def test_the_refiner_is_refused(pipeline: Any, model: Path) -> None:
    with pytest.raises(ModelError, match="is SDXL's refiner"):
        TorchRuntime(load(model, requires_aesthetics_score=True), name="refiner")


def test_a_correct_export_passes(verified: Callable[..., Verification], edited: Path) -> None:
    done = verified(edited)
    assert done.passed
    outputs = {"text_encoder", "pooled_text", "denoiser", "vae_decoder", "latents", "images"}
    assert {row.output for row in done.rows} == outputs
    assert set(done.b.precision) == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
    assert set(done.a.precision) == {"text_encoder", "text_encoder_2", "unet", "vae"}
    for row in done.rows:
        assert row.relative is not None
        assert row.relative < 1e-4
        if row.output in ("text_encoder", "pooled_text", "vae_decoder"):
            assert row.moved == 0
        if row.output == "denoiser":
            assert row.moved > 1e-2


def test_the_unedited_unet_is_caught(verified: Callable[..., Verification], plain: Path) -> None:
    done = verified(plain)
    assert {row.output for row in done.failures} == {"denoiser", "latents", "images"}
    erased = [row.to_move for row in done.rows if row.output == "denoiser" and row.group == "erased"]
    assert erased == pytest.approx([1, 1], abs=1e-3)


def test_another_vector_is_caught(verified: Callable[..., Verification], edited: Path, tmp_path: Path) -> None:
    """The second text encoder's projection with its sign changed: its hidden states are right."""
    folder = Path(shutil.copytree(edited, tmp_path / "wrong"))
    path = folder / "text_encoder_2" / "model.onnx"
    graph = onnx.load(path)
    (last,) = [node for node in graph.graph.node if "text_embeds" in node.output]
    (weight,) = [one for one in graph.graph.initializer if one.name in last.input]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(graph, path)
    done = verified(folder)
    failed = {row.output for row in done.failures}
    assert "pooled_text" in failed
    assert not failed & {"text_encoder", "denoiser", "vae_decoder"}, "each of them is given the right inputs"


def test_another_family_is_not_compared(
    verified: Callable[..., Verification], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is SDXL, and the other one isn't"):
        verified(f"torch:{tiny_model}")


def test_evaluations_open_either(model: Path, edited: Path) -> None:
    images = [
        open_runtime(parse_runtime(text), load_pipeline).generate(REQUESTS[:1], **LOOP)
        for text in (f"torch=torch:{model}", f"onnx=onnx:{edited}")
    ]
    assert images[0].shape == images[1].shape == (1, 16, 16, 3)


def test_the_vae_stays_in_single_precision(model: Path) -> None:
    spec = parse_side(f"torch:{model}?dtype=float16")
    described, rounding = precision(spec)
    assert (described["vae"], described["text_encoder_2"], rounding) == ("float32", "float16", "half")
    pipeline = open_side(spec, load_pipeline).runtime.pipeline  # type: ignore[attr-defined]
    assert (str(pipeline.vae.dtype), str(pipeline.text_encoder_2.dtype)) == ("torch.float32", "torch.float16")
