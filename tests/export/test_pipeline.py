"""Loading: whole folders load, half-written ones are one clear line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.errors import FingerprintMismatch, ModelError
from excise.export.pipeline import check_model, cross_attention, load_pipeline, read_weights

UNET = "unet/diffusion_pytorch_model.safetensors"


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def no_unet(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    index["prior"] = index.pop("unet")
    (model / "model_index.json").write_text(json.dumps(index))


def only_bin(model: Path) -> None:
    (model / UNET).rename(model / "unet" / "diffusion_pytorch_model.bin")


def lost_shard(model: Path) -> None:
    listing = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "shard-2.safetensors"}}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listing))


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("no index", lambda m: (m / "model_index.json").unlink(), "has no model_index.json"),
    ("index cut off", lambda m: truncate(m / "model_index.json", 40), "can't be read as JSON"),
    ("index is a list", lambda m: (m / "model_index.json").write_text("[]"), "is not a JSON object"),
    ("no denoiser", no_unet, "has no unet and no transformer .* prior, "),
    ("no folder", lambda m: shutil.rmtree(m / "vae"), "vae is missing, and model_index.json lists it"),
    ("no config", lambda m: (m / "unet" / "config.json").unlink(), "unet has no config.json"),
    ("no scheduler", lambda m: (m / "scheduler" / "scheduler_config.json").unlink(), "no scheduler_config.json"),
    ("no vocabulary", lambda m: (m / "tokenizer" / "vocab.json").unlink(), "tokenizer has no tokenizer.json or vocab"),
    ("no weights", lambda m: (m / UNET).unlink(), "unet has no safetensors weights: download"),
    ("only .bin", only_bin, "unet has no safetensors weights: convert its .bin weights"),
    ("shard lost", lost_shard, r"shard-2\.safetensors is missing"),
    ("empty", lambda m: truncate(m / UNET, 0), r"cut off in its header \(0 bytes\)"),
    ("header cut off", lambda m: truncate(m / UNET, 500), r"cut off in its header \(500 bytes\)"),
    (
        "data cut off",
        lambda m: truncate(m / UNET, 500_000),
        r"cut off or altered \(500000 bytes, its header says \d+\)",
    ),
    ("not safetensors", lambda m: (m / UNET).write_bytes(b"\x03" + bytes(7) + b"{{{"), "isn't a safetensors file"),
]


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_half_written_model_is_one_clear_error(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load_pipeline(copy)
    assert "\n" not in str(caught.value)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere doesn't exist: name a diffusers folder"):
        load_pipeline(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_had_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"^nobody/nothing can't be loaded: ") as caught:
        load_pipeline("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_absent_optional_components_are_done_without(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (copy / "model_index.json").write_text(json.dumps(index))
    assert check_model(copy) == ("safety_checker",)
    assert load_pipeline(copy).safety_checker is None


def test_half_precision_variants_load(copy: Path) -> None:
    (copy / UNET).rename(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert str(load_pipeline(copy).unet.dtype) == "torch.float32"


def test_checking_needs_no_heavy_import(tiny_model: Path) -> None:
    code = (
        "import sys, pathlib; from excise.export.pipeline import check_model; "
        f"check_model(pathlib.Path({str(tiny_model)!r})); "
        "print([m for m in ('torch', 'diffusers', 'onnx', 'optimum') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_edit_moves_its_sites_and_nothing_else(tiny_model: Path, edit: Any, sites: tuple[str, ...]) -> None:
    base, moved = load_pipeline(tiny_model).unet, load_pipeline(tiny_model, edit).unet
    assert set(cross_attention(base)) == set(sites)
    names = [name for name, _ in base.named_parameters()]
    before, after = read_weights(base, names), read_weights(moved, names)
    expected = edit.apply({name: before[name] for name in sites})
    for name in names:
        np.testing.assert_array_equal(after[name], expected.get(name, before[name]))
        assert (name in sites) == (not np.array_equal(before[name], after[name]))


def test_an_edit_for_another_model_is_refused_unless_forced(tiny_model: Path, edit: Any) -> None:
    foreign = replace(edit, foreign=True)
    with pytest.raises(FingerprintMismatch):
        load_pipeline(tiny_model, foreign)
    load_pipeline(tiny_model, foreign, force=True)
    with pytest.raises(FingerprintMismatch, match="this one has no transformer"):
        load_pipeline(tiny_model, replace(edit, component="transformer"), force=True)
    with pytest.raises(FingerprintMismatch, match=r"this one has no nowhere\.weight"):
        load_pipeline(tiny_model, replace(edit, sites=("nowhere.weight",)), force=True)
