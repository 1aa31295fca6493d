"""An exported pipeline gives the images of the diffusers pipeline that it was exported from, without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request, initial_latents

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers' Euler scheduler calls np.array(torch.Tensor)
)

REQUESTS = [
    Request("a gun", seed=1),
    Request("a red apple", "a gun", seed=2),
    Request("", seed=1, index=3),
    Request("a gun", "blue", seed=1),
    Request("🔫 A  GUN!", seed=7),
]
SETTINGS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 5.0}


def edit_json(file: Path, **values: Any) -> None:
    """Sets values of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def reference(
    model: Path, requests: Sequence[Request], output: str, scheduler: str | None = None, **settings: Any
) -> Any:
    """Latents or images of diffusers' own pipeline, from the same initial latents."""
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model)
    if scheduler is not None:
        config = {**pipeline.scheduler.config, "skip_prk_steps": True}
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(config)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        [request.prompt for request in requests],
        negative_prompt=[request.negative_prompt for request in requests],
        latents=torch.from_numpy(initial_latents(requests, (4, 8, 8))),
        output_type=output,
        **settings,
    ).images
    return result.numpy() if output == "latent" else np.stack([np.asarray(image) for image in result])


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_equal_to_diffusers(runtime: OnnxRuntime, tiny_model: Path, guidance_scale: float) -> None:
    settings = {"num_inference_steps": 10, "guidance_scale": guidance_scale}
    latents = runtime.denoise(REQUESTS, **settings)
    assert latents.dtype == np.float32
    assert np.abs(latents - reference(tiny_model, REQUESTS, "latent", **settings)).max() <= 1e-4
    images = runtime.generate(REQUESTS, **settings)
    assert images.dtype == np.uint8
    expected = reference(tiny_model, REQUESTS, "pil", **settings)
    assert images.shape == expected.shape == (5, 16, 16, 3)
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert images.std() > 1


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_other_schedulers(copy: Path, tiny_model: Path, scheduler: str) -> None:
    edit_json(copy / "scheduler" / "scheduler_config.json", _class_name=scheduler, skip_prk_steps=True)
    calls: list[tuple[int, int]] = []
    latents = OnnxRuntime(copy, threads=1).denoise(
        REQUESTS[:2], progress=lambda done, total: calls.append((done, total)), **SETTINGS
    )
    expected = reference(tiny_model, REQUESTS[:2], "latent", scheduler, **SETTINGS)
    assert np.abs(latents - expected).max() <= 1e-4
    assert calls[-1] == ((11, 11) if scheduler == "PNDMScheduler" else (10, 10))


def test_an_image_depends_on_its_own_request_alone(exported: Path, runtime: OnnxRuntime) -> None:
    together = runtime.denoise(REQUESTS, **SETTINGS)
    chunked = OnnxRuntime(exported, threads=1, batch_size=2).denoise(REQUESTS, **SETTINGS)
    backwards = runtime.denoise(REQUESTS[::-1], **SETTINGS)[::-1]
    alone = np.concatenate([runtime.denoise([request], **SETTINGS) for request in REQUESTS])
    for latents in (chunked, backwards, alone):
        assert np.abs(latents - together).max() <= 1e-5  # none at all was measured


def test_same_request_same_image(runtime: OnnxRuntime) -> None:
    np.testing.assert_array_equal(runtime.generate(REQUESTS, **SETTINGS), runtime.generate(REQUESTS, **SETTINGS))


def test_threads_can_share_a_runtime(runtime: OnnxRuntime) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda requests: runtime.denoise(requests, **SETTINGS), (REQUESTS[:2], REQUESTS[2:]))
    assert np.abs(np.concatenate([first, second]) - runtime.denoise(REQUESTS, **SETTINGS)).max() <= 1e-5


def test_what_changes_an_image(runtime: OnnxRuntime) -> None:
    base = Request("a gun", seed=1)
    others = [
        Request("a cat", seed=1),
        Request("a gun", "blue", seed=1),
        Request("a gun", seed=2),
        Request("a gun", "", 1, 1),
    ]
    latents = runtime.denoise([base, *others], **SETTINGS)
    assert all(np.abs(latents[0] - other).max() > 1e-3 for other in latents[1:])
    unguided = runtime.denoise([base, others[1]], num_inference_steps=3, guidance_scale=1.0)
    np.testing.assert_allclose(unguided[0], unguided[1], atol=1e-6)  # no guidance, no negative prompt


def test_number_of_model_calls(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = OnnxRuntime(exported, threads=1)
    batches: dict[str, list[int]] = {"_unet": [], "_text_encoder": []}

    def counted(name: str) -> Callable[..., Any]:
        component = getattr(runtime, name)

        class Counted:
            def __call__(self, **values: Any) -> Any:
                batches[name].append(len(next(iter(values.values()))))
                return component(**values)

            def __getattr__(self, attribute: str) -> Any:
                return getattr(component, attribute)

        return Counted()

    for name in batches:
        monkeypatch.setattr(runtime, name, counted(name))
    runtime.denoise(REQUESTS, num_inference_steps=3, guidance_scale=5.0)
    assert batches == {"_unet": [10, 10, 10], "_text_encoder": [5]}  # "a gun", "a red apple", "", "🔫 …", "blue"
    runtime.denoise(REQUESTS, num_inference_steps=3, guidance_scale=1.0)
    assert batches["_unet"][3:] == [5, 5, 5]


def test_progress(exported: Path) -> None:
    calls: list[tuple[int, int]] = []
    OnnxRuntime(exported, threads=1, batch_size=2).generate(
        REQUESTS, num_inference_steps=4, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 12) for done in range(1, 13)]


def test_interrupt_passes_through(runtime: OnnxRuntime) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.generate(REQUESTS[:1], num_inference_steps=2, progress=interrupt)


def test_no_requests(runtime: OnnxRuntime) -> None:
    assert runtime.generate([]).shape == (0, 16, 16, 3)
    assert runtime.denoise([]).shape == (0, 4, 8, 8)
    assert runtime.encode([]).shape == (0, 24, 32)
    assert runtime.generate([]).dtype == np.uint8


def test_shift_factor(copy: Path, runtime: OnnxRuntime) -> None:
    latents = runtime.denoise(REQUESTS[:1], **SETTINGS)
    edit_json(copy / "vae_decoder" / "config.json", shift_factor=1.5, scaling_factor=2 * 0.18215)
    shifted = OnnxRuntime(copy, threads=1).decode((latents / 0.18215 - 1.5) * 2 * 0.18215)
    assert np.abs(shifted.astype(int) - runtime.decode(latents)).max() <= 1


def test_without_torch(exported: Path) -> None:
    script = (
        "import sys\n"
        "import excise.serve\n"
        "from excise.serve.onnx_runtime import OnnxRuntime\n"
        f"runtime = OnnxRuntime({str(exported)!r}, threads=1)\n"
        "images = runtime.generate([excise.serve.Request('a gun')], num_inference_steps=2)\n"
        "assert images.shape == (1, 16, 16, 3)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'optimum', 'onnx'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
