"""Parity figures: exact, lost and half-lost edits score 0, 1 and in between; inputs are seeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from excise.errors import ArtefactError, NumericsError
from excise.export.parity import torch_outputs
from excise.export.pipeline import load_pipeline
from excise.parity import Parity, parity
from tests.export.unet_parity import make_inputs, text_states, unet_parity


def arrays() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(0)
    base = random.standard_normal((2, 3, 4)).astype(np.float32)
    return base, base + random.standard_normal((2, 3, 4)).astype(np.float32)


def test_exact_lost_and_half_lost_edits() -> None:
    base, edited = arrays()
    assert parity(base, edited, edited).relative == 0
    assert parity(base, edited, edited).max_abs == 0
    lost = parity(base, edited, base)
    assert lost.relative == 1
    assert lost.max_abs == lost.edit_max_abs == np.abs(edited.astype(float) - base.astype(float)).max()
    assert parity(base, edited, (base + edited) / 2).relative == pytest.approx(0.5, rel=1e-6)


def test_it_does_not_depend_on_scale() -> None:
    base, edited = arrays()
    found = edited + 0.01
    one, other = parity(base, edited, found), parity(base * 64, edited * 64, found * 64)
    assert other.relative == pytest.approx(one.relative, rel=1e-12)
    assert other.edit_relative == pytest.approx(one.edit_relative, rel=1e-12)


def test_figures_by_name() -> None:
    assert Parity(1.0, 2.0, 3.0, 4.0).dict() == {
        "relative": 1.0,
        "max_abs": 2.0,
        "edit_relative": 3.0,
        "edit_max_abs": 4.0,
    }


def test_what_has_no_answer_is_refused() -> None:
    base, edited = arrays()
    with pytest.raises(NumericsError, match="changes none of these outputs"):
        parity(base, base, edited)
    with pytest.raises(NumericsError, match="equal shapes"):
        parity(base, edited, edited[:1])
    with pytest.raises(NumericsError, match="exported model's outputs aren't finite"):
        parity(base, edited, edited * np.float32(np.inf))


def test_the_edited_export_computes_the_edited_model_and_the_plain_one_does_not(
    tiny_model: Path,
    edit: Any,
    plain: Path,
    edited: Path,
) -> None:
    pipe = load_pipeline(tiny_model)
    states = text_states(pipe, ["a gun", ""])
    assert states.shape == (2, 24, 32)
    moved = load_pipeline(tiny_model, edit).unet
    good = unet_parity(pipe.unet, moved, edited / "unet" / "model.onnx", states, seed=3)
    lost = unet_parity(pipe.unet, moved, plain / "unet" / "model.onnx", states, seed=3)
    assert good.edit_relative > 0.01
    assert good.relative < 1e-4
    assert lost.relative == pytest.approx(1, abs=1e-4)


def test_inputs_are_seeded(tiny_model: Path) -> None:
    unet = load_pipeline(tiny_model).unet
    states = np.ones((2, 24, 32), np.float32)
    one, same, other = (make_inputs(unet, states, seed=seed, timesteps=(5,)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.sample, same.sample)
    assert not np.array_equal(one.sample, other.sample)
    assert torch_outputs(unet, one).shape == (1, 2, 4, 8, 8)


def test_a_file_that_is_not_a_unet_is_one_clear_error(tiny_model: Path, plain: Path, tmp_path: Path) -> None:
    unet = load_pipeline(tiny_model).unet
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    for path in (tmp_path / "junk.onnx", plain / "vae_decoder" / "model.onnx"):
        with pytest.raises(ArtefactError, match="can't be run as a Stable Diffusion UNet") as caught:
            unet_parity(unet, unet, path, np.ones((1, 24, 32)))
        assert "\n" not in str(caught.value)
