"""ONNX Runtime's CUDA provider beside its CPU provider: the same artefact, the same images.

Everything here needs a GPU and onnxruntime-gpu. TF32 is off, as the runtime leaves it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from excise.editfile import Edit
from excise.errors import UsageError
from excise.eval.torch_runtime import TorchRuntime
from excise.export.onnx_export import export_pipeline
from excise.export.patch import patch
from excise.export.pipeline import load_pipeline, read_weights
from excise.export.text_edit_folders import bank_folder
from excise.manifest import read_manifest
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from tests.random_edits import random_edit

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="no CUDA device, or an onnxruntime without CUDA: not run on a GPU",
)
REQUESTS = [Request(prompt, seed=seed) for seed, prompt in enumerate(("a gun", "a cat", "", "a gun and a cat"))]
SETTINGS: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0}
#: Largest relative difference of final latents between the providers.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda") / "plain"
    export_pipeline(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def edits(tiny_model: Path, plain: Path) -> tuple[Edit, Edit]:
    weights = read_weights(load_pipeline(tiny_model).unet, sorted(read_manifest(plain).weights))
    copies = {name: np.array(values) for name, values in weights.items()}
    return random_edit(copies, 1, scale=0.3), random_edit(copies, 2, scale=0.3)


def latents(folder: Path, **options: Any) -> Any:
    return OnnxRuntime(folder, **options).denoise(REQUESTS, **SETTINGS)


def difference(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_cuda_computes_what_the_cpu_does(plain: Path) -> None:
    assert difference(latents(plain, provider="cuda"), latents(plain)) < TOLERANCE


def test_cuda_computes_what_torch_does(tiny_model: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # PyTorch's default for convolutions
    pipeline = load_pipeline(tiny_model).to("cuda")
    there = TorchRuntime(pipeline, name="torch").denoise(REQUESTS, **SETTINGS)
    assert difference(latents(plain, provider="cuda"), there) < TOLERANCE


def test_a_patched_folder_and_an_edit_at_load_are_one(plain: Path, edits: tuple[Edit, Edit], tmp_path: Path) -> None:
    patch(plain, edits[0], out=tmp_path / "patched")
    patched = latents(tmp_path / "patched", provider="cuda")
    at_load = latents(plain, provider="cuda", edit=edits[0])
    assert difference(at_load, patched) < TOLERANCE
    assert difference(patched, latents(tmp_path / "patched")) < TOLERANCE
    assert difference(latents(plain, provider="cuda"), patched) > 100 * TOLERANCE, "the edit moves the latents"


def test_a_bank_gives_each_row_its_edit(plain: Path, edits: tuple[Edit, Edit], tmp_path: Path) -> None:
    bank_folder(plain, tmp_path / "bank", edits, with_base=True)
    requests = [Request("a gun", seed=1, edit=chosen) for chosen in (None, edits[0].id, edits[1].id)]
    bank = OnnxRuntime(tmp_path / "bank", provider="cuda").denoise(requests, **SETTINGS)
    for row, edit in enumerate((None, *edits)):
        alone = OnnxRuntime(plain, provider="cuda", edit=edit).denoise([Request("a gun", seed=1)], **SETTINGS)
        assert difference(bank[row : row + 1], alone) < TOLERANCE


def test_half_precision_stays_near(tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    export_pipeline(tiny_model, tmp_path / "half", dtype="fp16")
    half, full = latents(tmp_path / "half", provider="cuda"), latents(plain)
    assert np.isfinite(half).all()
    assert 1e-6 < difference(half, full) < 0.02, "computed in half precision, and no more than that away"


def test_a_gpu_that_is_not_there_is_refused(plain: Path) -> None:
    with pytest.raises((UsageError, Exception), match=r"99|device"):
        OnnxRuntime(plain, provider="cuda", device=99)
