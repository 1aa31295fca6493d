"""An exported SDXL gives the images of diffusers' own pipeline, and every way to feed it wrongly is seen."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import ArtefactError, ModelError, PromptTooLong, UsageError
from excise.eval.torch_runtime import TorchRuntime
from excise.serve import text_encoders
from excise.serve.engine import ImageRequest
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.open_engine import open_engine
from excise.serve.runtime import Request
from excise.serve.safe_latent_diffusion import SafeLatentDiffusion, Strength
from excise.serve.text_conditioning import TextConditioning, time_ids
from excise.serve.text_layout import read_text_layout
from tests.serve.tiny_xl import edit_of, load, model_and_export, own_call

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers' Euler scheduler calls np.array(torch.Tensor)
)

REQUESTS = [
    Request("a gun", seed=1),
    Request("a red cat", "a dog", seed=2),
    Request("a gun!", "!", seed=3),
    Request("", seed=1, index=4),
]
SETTINGS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_export(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export, unedited. Not to be changed by tests."""
    return model_and_export(tmp_path_factory)[1]


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    return load(model)


@pytest.fixture(scope="module")
def xl(folder: Path) -> OnnxRuntime:
    return OnnxRuntime(folder, threads=1)


@pytest.fixture(scope="module")
def expected(pipeline: Any) -> Any:
    """The latents of diffusers' pipeline, called for each request alone."""
    return np.stack([own_call(pipeline, request, "latent", **SETTINGS) for request in REQUESTS])


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def relative(found: Any, expected: Any) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ of an image."""
    return max(
        float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in zip(found, expected, strict=True)
    )


def test_latents_are_diffusers(xl: OnnxRuntime, expected: Any) -> None:
    found = xl.denoise(REQUESTS, **SETTINGS)
    assert found.dtype == np.float32
    assert relative(found, expected) < 1e-4


def test_images_are_diffusers(xl: OnnxRuntime, pipeline: Any) -> None:
    wanted = np.stack([own_call(pipeline, request, "pil", **SETTINGS) for request in REQUESTS])
    found = xl.generate(REQUESTS, **SETTINGS)
    assert found.shape == wanted.shape == (4, 16, 16, 3)
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert found.std() > 1


@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {"guidance_scale": 5.0, "size": (24, 32)}])
def test_without_guidance_and_at_another_size(xl: OnnxRuntime, pipeline: Any, settings: dict[str, Any]) -> None:
    """The second size is another in ``time_ids``, too."""
    height, width = settings.pop("size", (None, None))
    sized = [dataclasses.replace(request, height=height, width=width) for request in REQUESTS[:2]]
    settings = {"num_inference_steps": 2, **settings}
    wanted = [own_call(pipeline, request, "latent", **settings) for request in sized]
    assert relative(xl.denoise(sized, **settings), wanted) < 1e-4


def test_an_empty_negative_prompt_without_forced_zeros_is_its_text(copied: Path, model: Path, expected: Any) -> None:
    edit_json(copied / "model_index.json", force_zeros_for_empty_prompt=False)
    pipeline = load(model, force_zeros_for_empty_prompt=False)
    wanted = [own_call(pipeline, request, "latent", **SETTINGS) for request in REQUESTS]
    found = OnnxRuntime(copied, threads=1).denoise(REQUESTS, **SETTINGS)
    assert relative(found, wanted) < 1e-4
    assert relative(found[:1], expected[:1]) > 1e-2, "zeros are something else"
    np.testing.assert_allclose(found[1], expected[1], atol=1e-3)


def test_an_image_depends_on_its_own_request_alone(folder: Path, xl: OnnxRuntime) -> None:
    together = xl.denoise(REQUESTS, **SETTINGS)
    chunked = OnnxRuntime(folder, threads=1, batch_size=2).denoise(REQUESTS, **SETTINGS)
    alone = np.concatenate([xl.denoise([request], **SETTINGS) for request in REQUESTS])
    backwards = xl.denoise(REQUESTS[::-1], **SETTINGS)[::-1]
    for latents in (chunked, alone, backwards):
        assert relative(latents, together) < 1e-5


def test_images_that_leave_take_their_vectors_with_them(xl: OnnxRuntime) -> None:
    together = xl.start(REQUESTS, num_inference_steps=3, guidance_scale=[5.0, 5.0, 2.0, 5.0])
    together.step()
    together.keep([1, 2])
    together.step()
    together.keep([1])
    alone = xl.denoise(REQUESTS[2:3], num_inference_steps=3, guidance_scale=2.0)
    assert together.rows.tolist() == [2]
    assert relative(together.run(), alone) < 1e-5


@pytest.mark.parametrize("mistake", ["vector", "order", "last", "zeros", "size", "padding"])
def test_a_mistake_would_be_seen(folder: Path, expected: Any, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls of the comparison with diffusers."""
    runtime = OnnxRuntime(folder, threads=1)
    right = runtime.condition

    def wrong(prompts: Any) -> TextConditioning:
        found = right(prompts)
        assert found.pooled is not None
        if mistake == "vector":
            return TextConditioning(found.embeds, np.roll(found.pooled, 1, axis=1))
        return TextConditioning(np.roll(found.embeds, 24, axis=2), found.pooled)

    if mistake in ("vector", "order"):
        monkeypatch.setattr(runtime, "condition", wrong)
    elif mistake == "last":
        monkeypatch.setattr(text_encoders, "penultimate", lambda component: "hidden_states.3")
    elif mistake == "zeros":
        monkeypatch.setattr(runtime, "_zeros_for_empty_negative", False)
    elif mistake == "size":
        monkeypatch.setattr("excise.serve.unet_inputs.time_ids", lambda n, height, width: time_ids(n, 1024, 1024))
    else:
        monkeypatch.setattr(runtime, "tokenizer_2", runtime.tokenizer)
    assert relative(runtime.denoise(REQUESTS, **SETTINGS), expected) > 1e-3


def test_safe_latent_diffusion_is_the_same_on_pytorch(folder: Path, pipeline: Any, xl: OnnxRuntime) -> None:
    guidance = SafeLatentDiffusion(Strength(1, 2000, 0.025, 0.5, 0.7), "a gun")
    onnx = OnnxRuntime(folder, threads=1, guidance=guidance).denoise(REQUESTS, **SETTINGS)
    torch = TorchRuntime(pipeline, name="torch", guidance=guidance).denoise(REQUESTS, **SETTINGS)
    assert relative(onnx, xl.denoise(REQUESTS, **SETTINGS)) > 1e-2, "it does something"
    assert relative(onnx, torch) < 1e-3


def test_embeddings_take_the_place_of_hidden_states_alone(xl: OnnxRuntime, pipeline: Any) -> None:
    embeds = xl.encode([request.prompt for request in REQUESTS])
    assert embeds.shape == (4, 24, 56)
    found = xl.denoise(REQUESTS, prompt_embeds=embeds, **SETTINGS)
    np.testing.assert_array_equal(found, xl.denoise(REQUESTS, **SETTINGS))
    torch = TorchRuntime(pipeline, name="torch")
    moved = embeds[::-1].copy()
    assert (
        relative(
            xl.denoise(REQUESTS, prompt_embeds=moved, **SETTINGS),
            torch.denoise(REQUESTS, prompt_embeds=moved, **SETTINGS),
        )
        < 1e-4
    )
    for runtime in (xl, torch):
        with pytest.raises(UsageError, match=r"prompt_embeds has shape \(4, 24, 32\): give \(4, 24, 56\)"):
            runtime.denoise(REQUESTS, prompt_embeds=embeds[..., :32], **SETTINGS)  # type: ignore[attr-defined]


def test_no_requests_and_no_prompts(xl: OnnxRuntime) -> None:
    assert xl.generate([]).shape == (0, 16, 16, 3)
    assert xl.encode([]).shape == (0, 24, 56)
    assert xl.condition([]).pooled is not None


def test_an_edit_at_load_is_that_of_pytorch(folder: Path, model: Path, expected: Any) -> None:
    from excise.export.pipeline import load_pipeline

    edit = edit_of(model)
    pipeline = load_pipeline(model, edit)
    pipeline.set_progress_bar_config(disable=True)
    runtime = OnnxRuntime(folder, threads=1, edit=edit)
    assert runtime.edit_id == edit.id
    wanted = [own_call(pipeline, request, "latent", **SETTINGS) for request in REQUESTS[:2]]
    found = runtime.denoise(REQUESTS[:2], **SETTINGS)
    assert relative(found, wanted) < 1e-4
    assert relative(found, expected[:2]) > 1e-2


def test_the_embedded_servers_engine_makes_the_same_images(folder: Path, xl: OnnxRuntime) -> None:
    with open_engine(folder, with_base=True, threads=1, batch_delay=0.2) as engine:
        jobs = [
            engine.submit(ImageRequest(request, num_inference_steps=3, guidance_scale=5.0)) for request in REQUESTS[:2]
        ]
        images = [job.future.result(timeout=60) for job in jobs]
        with pytest.raises(PromptTooLong):
            engine.submit(ImageRequest(Request("1 " * 29), num_inference_steps=3, guidance_scale=5.0))
    wanted = xl.generate(REQUESTS[:2], **SETTINGS)
    assert np.abs(np.stack(images).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    "file", ["text_encoder_2/model.onnx", "text_encoder_2/config.json", "tokenizer_2/tokenizer_config.json"]
)
def test_missing_part(copied: Path, file: str) -> None:
    (copied / file).unlink()
    with pytest.raises(ArtefactError, match=f"has no {file}"):
        OnnxRuntime(copied)


def test_without_its_second_encoder_it_is_still_sdxl(copied: Path) -> None:
    shutil.rmtree(copied / "text_encoder_2")
    with pytest.raises(ArtefactError, match=r"has no text_encoder_2/model\.onnx"):
        OnnxRuntime(copied)
    edit_json(copied / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(ArtefactError, match=r"unet/model\.onnx takes .*text_embeds, time_ids.* takes encoder_hidden"):
        OnnxRuntime(copied)
    (copied / "model_index.json").write_text("[]")
    with pytest.raises(ArtefactError, match=r"model_index\.json isn't a JSON object"):
        OnnxRuntime(copied)
    (copied / "model_index.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"model_index\.json can't be read"):
        OnnxRuntime(copied)


def test_encoders_in_each_others_places(copied: Path) -> None:
    for name in ("first", "text_encoder", "text_encoder_2"):
        target = {"first": "text_encoder_2", "text_encoder": "first", "text_encoder_2": "text_encoder"}[name]
        if name != "first":
            (copied / name).rename(copied / target)
    (copied / "first").rename(copied / "text_encoder_2")
    with pytest.raises(ArtefactError, match="has no output 'text_embeds'"):
        OnnxRuntime(copied)


def test_another_models_encoder_does_not_fit(copied: Path) -> None:
    """The second one in both places: its hidden states are narrower than the first one's."""
    shutil.rmtree(copied / "text_encoder")
    shutil.copytree(copied / "text_encoder_2", copied / "text_encoder")
    with pytest.raises(ArtefactError, match="reads encoder_hidden_states of width 56, and this pipeline has 48"):
        OnnxRuntime(copied)


def test_an_export_without_hidden_states(copied: Path) -> None:
    edit_json(copied / "text_encoder" / "config.json", num_hidden_layers=9)
    with pytest.raises(ArtefactError, match=r"has no output hidden_states\.8, only last_hidden_state"):
        OnnxRuntime(copied)


def test_tokenizers_of_different_lengths(copied: Path) -> None:
    edit_json(copied / "tokenizer_2" / "tokenizer_config.json", model_max_length=12)
    with pytest.raises(ModelError, match="tokenizer 24 and tokenizer_2 12 tokens"):
        OnnxRuntime(copied)


def test_what_is_not_run_here(copied: Path) -> None:
    edit_json(copied / "vae_decoder" / "config.json", latents_mean=[0.0] * 4)
    with pytest.raises(ModelError, match="latents_mean"):
        OnnxRuntime(copied)
    edit_json(copied / "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(ModelError, match="is SDXL's refiner"):
        OnnxRuntime(copied)
    edit_json(copied / "model_index.json", requires_aesthetics_score=False)
    (copied / "unet").rename(copied / "transformer")
    with pytest.raises(ModelError, match="has a transformer and no unet"):
        OnnxRuntime(copied)


def test_unusable_arguments(xl: OnnxRuntime) -> None:
    for request in (Request("1 " * 29), Request("", "1 " * 29)):
        with pytest.raises(PromptTooLong, match="has 31 tokens, this model reads 24: shorten it"):
            xl.generate([*REQUESTS, request])
    with pytest.raises(UsageError, match="give text_embeds"):
        xl.predict(np.zeros((1, 4, 8, 8), np.float32), 5.0, np.zeros((1, 24, 56), np.float32))


def test_layout_without_an_index(tmp_path: Path) -> None:
    assert read_text_layout(tmp_path).components == ("text_encoder", "unet", "vae_decoder")
    (tmp_path / "text_encoder_2").mkdir()
    found = read_text_layout(tmp_path)
    assert found.components == ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    assert found.tokenizers == ("tokenizer", "tokenizer_2")
    assert found.zeros_for_empty_negative


def test_without_torch(folder: Path) -> None:
    script = (
        "import sys\n"
        "import excise.serve\n"
        "from excise.serve.onnx_runtime import OnnxRuntime\n"
        f"runtime = OnnxRuntime({str(folder)!r}, threads=1)\n"
        "assert runtime.generate([excise.serve.Request('a gun')], num_inference_steps=2).shape == (1, 16, 16, 3)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'optimum', 'onnx'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
