"""What can't be used is an error that says what and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import ArtefactError, ModelError, PromptTooLong, UsageError
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:FutureWarning",  # once, when diffusers is imported
    "ignore:__array__ implementation:DeprecationWarning",  # diffusers' Euler scheduler calls np.array(torch.Tensor)
)

REQUESTS = [Request("a gun", seed=1), Request("a red apple", "a gun", seed=2)]


def edit_json(file: Path, **values: Any) -> None:
    """Sets values of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        (REQUESTS[0], {"num_inference_steps": 0}, "0 inference steps"),
        (REQUESTS[0], {"num_inference_steps": 1001}, "1 to 1000"),
        (REQUESTS[0], {"guidance_scale": float("nan")}, "guidance_scale=nan"),
        (REQUESTS[0], {"guidance_scale": float("inf")}, "guidance_scale=inf"),
        (Request("a gun", seed=-1), {}, "seed=-1"),
        (Request("a gun", seed=2**63), {}, "seed=9223372036854775808"),
        (Request("a gun", index=-2), {}, "index=-2"),
        (Request("a gun", seed=1.5), {}, "seed=1.5"),  # type: ignore[arg-type]
        (Request("\ud800"), {}, "Unicode"),
    ],
)
def test_unusable_arguments(runtime: OnnxRuntime, request_: Request, settings: dict[str, Any], message: str) -> None:
    for method in (runtime.generate, runtime.denoise):
        with pytest.raises(UsageError, match=message):
            method([request_], **settings)


def test_too_long_a_prompt(runtime: OnnxRuntime) -> None:
    for request in (Request("1 " * 29), Request("", "1 " * 29)):
        with pytest.raises(PromptTooLong, match="has 31 tokens, this model reads 24: shorten it"):
            runtime.generate([*REQUESTS, request])


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="nowhere isn't a folder"):
        OnnxRuntime(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file",
    [
        "text_encoder/model.onnx",
        "unet/model.onnx",
        "unet/config.json",
        "vae_decoder/model.onnx",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_missing_component(copy: Path, file: str) -> None:
    (copy / file).unlink()
    with pytest.raises(ArtefactError, match=f"has no {file}"):
        OnnxRuntime(copy)


@pytest.mark.parametrize(
    ("file", "values", "error", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, ModelError, "in_channels=9"),
        ("unet/config.json", {"sample_size": None}, ModelError, "sample_size=None"),
        ("vae_decoder/config.json", {"scaling_factor": 0}, ModelError, "scaling_factor=0"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, ModelError, "LCMScheduler"),
    ],
)
def test_unsupported_config(
    copy: Path, file: str, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit_json(copy / file, **values)
    with pytest.raises(error, match=message):
        OnnxRuntime(copy)


@pytest.mark.parametrize("options", [{"provider": "gpu"}, {"batch_size": 0}, {"threads": 0}])
def test_unusable_options(exported: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        OnnxRuntime(exported, **options)


def test_broken_values_are_not_a_picture(runtime: OnnxRuntime) -> None:
    with pytest.raises(ArtefactError, match="aren't finite"):
        runtime.decode(np.full((1, 4, 8, 8), np.inf, np.float32))
