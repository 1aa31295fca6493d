"""An edit behind the text encoder gives the pictures of the edit in the UNet, whose file it leaves as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from excise.edit.erase import erase
from excise.edit.recipe import resolve
from excise.editfile import Edit
from excise.errors import ArtefactError, EditError, FingerprintMismatch, OutputError
from excise.export.bank import add_bank
from excise.export.behind_text_encoder import fuse_behind_text_encoder
from excise.onnx_metadata import read_edit_id
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from tests.edit import tiny_models as tiny
from tests.export.text_edits import UNET, bake, half, in_one_file

TEXT = "text_encoder/model.onnx"
REQUESTS = (Request("a gun", seed=1), Request("a red gun", "a cat", seed=2), Request("", seed=3))


def make(model: Path, **changes: Any) -> Edit:
    recipe = {"erase": ("gun",), "to": ("sunflower",), "keep": ("cat",), "epochs": 1, **changes}
    return erase(model, resolve(None, None, recipe), certificate=False)


@pytest.fixture(scope="module")
def plain(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's export, its UNet in one file."""
    return in_one_file(plain, tmp_path_factory.mktemp("whole") / "onnx")


@pytest.fixture(scope="module")
def edit_of_text(tiny_model: Path) -> Edit:
    return make(tiny_model)


@pytest.fixture(scope="module")
def fused(plain: Path, edit_of_text: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export with the edit behind its text encoder. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("fused") / "onnx"
    shutil.copytree(plain, folder)
    (folder / TEXT).unlink()
    fuse_behind_text_encoder(plain / TEXT, folder / TEXT, edit_of_text)
    return folder


def denoised(folder: Path) -> NDArray[np.float32]:
    """Final latents; with guidance every step passes differences on, amplified."""
    return np.asarray(OnnxRuntime(folder, threads=1).denoise(REQUESTS, num_inference_steps=10, guidance_scale=5.0))


def test_the_whole_loop_is_as_with_the_edit_in_the_unet(
    plain: Path, fused: Path, edit_of_text: Edit, tmp_path: Path
) -> None:
    baked = Path(shutil.copytree(plain, tmp_path / "baked"))
    bake(plain / UNET, edit_of_text, baked / UNET)
    expected = denoised(baked)
    size = np.abs(expected).max()  # about 20: the tiny model's own
    assert np.abs(denoised(fused) - expected).max() < 1e-5 * size
    assert np.abs(denoised(plain) - expected).max() > 1e-2 * size
    assert (fused / UNET).read_bytes() == (plain / UNET).read_bytes()


def run(path: Path) -> dict[str, NDArray[Any]]:
    """Every output of a text encoder for the same prompt."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = np.arange(24, dtype=np.int64)[None] * 3 % 50
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input_ids": ids}), strict=True))


def test_only_the_last_states_are_multiplied(plain: Path, fused: Path, edit_of_text: Edit) -> None:
    before, after = run(plain / TEXT), run(fused / TEXT)
    matrix = edit_of_text.matrix(edit_of_text.sites[0])
    np.testing.assert_allclose(after["last_hidden_state"], before["last_hidden_state"] @ matrix.T, atol=1e-5)
    assert np.abs(after["last_hidden_state"] - before["last_hidden_state"]).max() > 0.1
    np.testing.assert_array_equal(after["pooler_output"], before["pooler_output"])
    assert list(after) == list(before)
    onnx.checker.check_model(str(fused / TEXT), full_check=True)


def test_the_file_carries_the_edits_id(plain: Path, fused: Path, edit_of_text: Edit) -> None:
    assert read_edit_id(fused / TEXT) == edit_of_text.id
    assert read_edit_id(fused / UNET) is None
    assert read_edit_id(plain / TEXT) is None


def test_half_precision(plain: Path, edit_of_text: Edit, tmp_path: Path) -> None:
    narrow = half(plain / TEXT, tmp_path / "half.onnx")
    fuse_behind_text_encoder(narrow, tmp_path / "fused.onnx", edit_of_text, unet=plain / UNET)
    before, after = run(narrow)["last_hidden_state"], run(tmp_path / "fused.onnx")["last_hidden_state"]
    assert after.dtype == np.float16
    expected = before.astype(np.float64) @ edit_of_text.matrix(edit_of_text.sites[0]).T
    assert np.linalg.norm(after - expected) < 4e-4 * np.linalg.norm(expected)  # rounding alone: 2⁻¹² to 2⁻¹¹


def test_families_that_join_text_encoders_are_refused_with_the_reason(
    folder_of: Callable[..., Path], plain: Path, tmp_path: Path
) -> None:
    for builder, reason in (
        (tiny.stable_diffusion_xl, "its transform mixes them"),
        (tiny.stable_diffusion_3, "isn't the last_hidden_state of one text encoder"),
    ):
        with pytest.raises(EditError, match=reason + r".*make a bank of one edit, or bake it"):
            fuse_behind_text_encoder(plain / TEXT, tmp_path / "model.onnx", make(folder_of(builder)))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_edit_of_this_text_is_refused(
    tiny_model: Path, plain: Path, fused: Path, edit_of_text: Edit, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    with pytest.raises(EditError, match="technique tensor"):
        fuse_behind_text_encoder(plain / TEXT, out, make(tiny_model, technique="tensor"))
    with pytest.raises(EditError, match="and 3 more as they are"):
        fuse_behind_text_encoder(plain / TEXT, out, make(tiny_model, sites={"projections": "k"}))
    with pytest.raises(FingerprintMismatch, match="made for another model"):
        fuse_behind_text_encoder(plain / TEXT, out, make(folder_of(tiny.stable_diffusion)))
    with pytest.raises(ArtefactError, match=f"carries edit {edit_of_text.id[:12]} already"):
        fuse_behind_text_encoder(fused / TEXT, out, edit_of_text)
    with pytest.raises(OutputError, match="exists already"):
        fuse_behind_text_encoder(plain / TEXT, fused / TEXT, edit_of_text)
    with pytest.raises(ArtefactError, match="has no node that puts out last_hidden_state, only latent"):
        fuse_behind_text_encoder(plain / "vae_encoder" / "model.onnx", out, edit_of_text)
    add_bank(plain / UNET, tmp_path / "bank.onnx", [edit_of_text])
    with pytest.raises(EditError, match="isn't an input of the model"):
        fuse_behind_text_encoder(plain / TEXT, out, edit_of_text, unet=tmp_path / "bank.onnx")
    shutil.copytree(plain / "text_encoder", tmp_path / "alone" / "text_encoder")
    with pytest.raises(ArtefactError, match=r"unet/model\.onnx doesn't exist"):
        fuse_behind_text_encoder(tmp_path / "alone" / TEXT, out, edit_of_text)
    assert not out.exists()


def test_a_text_encoder_of_another_width_is_refused(plain: Path, edit_of_text: Edit, tmp_path: Path) -> None:
    model = onnx.load(plain / TEXT)
    next(o for o in model.graph.output if o.name == "last_hidden_state").type.tensor_type.shape.dim[2].dim_value = 24
    onnx.save(model, tmp_path / "narrow.onnx")
    with pytest.raises(FingerprintMismatch, match="the edit is 32 wide"):
        fuse_behind_text_encoder(tmp_path / "narrow.onnx", tmp_path / "out.onnx", edit_of_text, unet=plain / UNET)
