"""The bundled model as it is served: put together from two places, and the same model as the one that is edited."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.demo import MODEL
from excise.demo.bundled_onnx import GRAPHS, STORED, WEIGHTS, bundled
from excise.errors import OutputError
from excise.manifest import read_manifest, verify
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request

SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled(tmp_path_factory.mktemp("cache"))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_is_the_model_that_is_edited(folder: Path) -> None:
    from excise.demo.bundle_onnx import edits
    from excise.eval.torch_runtime import TorchRuntime
    from excise.export.pipeline import load_pipeline

    runtime = OnnxRuntime(folder, threads=1)
    # By index: what another machine solves has the same values but for rounding, and so another id.
    unedited, weapons, gun = runtime.bank or ()
    assert unedited is None
    base = TorchRuntime(load_pipeline(MODEL), name="base")
    requests = [Request("a gun", seed=1), Request("a cat", seed=2)]
    expected = {None: base.denoise(requests, **SETTINGS)}
    for edit_id, edit in zip((weapons, gun), edits(), strict=True):
        expected[edit_id] = TorchRuntime(load_pipeline(MODEL, edit), name="edited").denoise(requests, **SETTINGS)
    for edit_id, latents in expected.items():
        found = runtime.denoise([Request(r.prompt, seed=r.seed, edit=edit_id) for r in requests], **SETTINGS)
        np.testing.assert_allclose(found, latents, atol=2e-3)
    assert np.abs(expected[weapons][0] - expected[None][0]).max() > 0.1, "the edit has to be seen"


def test_what_is_packed_fits_the_weights(folder: Path) -> None:
    manifest = read_manifest(GRAPHS)
    assert verify(folder) == []
    assert {f"{component}/{WEIGHTS}" for component in STORED} < set(manifest.files)
    for component, stored in STORED.items():
        assert manifest.files[f"{component}/{WEIGHTS}"].size == (MODEL / stored).stat().st_size


def test_made_once_and_mended(tmp_path: Path) -> None:
    said: list[str] = []
    folder = bundled(tmp_path, say=said.append)
    assert len(said) == 1
    assert bundled(tmp_path, say=said.append) == folder
    assert len(said) == 1
    with (folder / "unet" / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert verify(folder)
    assert bundled(tmp_path, say=said.append) == folder
    assert len(said) == 2
    assert verify(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_cache_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OutputError):
        bundled(blocked / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    said: list[str] = []
    folder = bundled(say=said.append)
    assert verify(folder) == []
    assert "can't be written" in said[-1]
    shutil.rmtree(folder.parent)


def test_needs_no_pytorch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from excise.demo.bundled_onnx import bundled;"
        f"bundled(Path({str(folder.parent)!r}));"
        "assert not {'torch', 'onnx', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
