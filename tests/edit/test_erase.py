"""From prompts to an edit and to an edited folder, on a tiny random Stable Diffusion."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.edit.apply import apply_edit
from excise.edit.erase import Options, erase
from excise.edit.model_folder import cross_attention_weights
from excise.edit.presets import PRESETS, preset
from excise.edit.text import TextEncoder
from excise.errors import FingerprintMismatch, ModelError, NoCrossAttention, OutputError, PromptTooLong, UsageError

OPTIONS = Options(erase=("gun",), to=("sunflower",), keep=("cat", "dog"))
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_the_sites_are_every_cross_attention_key_and_value(tiny_model: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    expected = {
        f"{name}.{part}.weight"
        for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False)
        for part in ("to_k", "to_v")
    }
    assert set(cross_attention_weights(tiny_model)) == expected
    assert len(expected) == 8


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_apply_moves_the_sites_and_nothing_else(tiny_model: Path, tmp_path: Path, technique: str) -> None:
    options = replace(OPTIONS, technique="tensor" if technique == "tensor" else "replace")
    edit = erase(tiny_model, options)
    apply_edit(tiny_model, edit, tmp_path / "edited")
    before, after = load_file(tiny_model / UNET), load_file(tmp_path / "edited" / UNET)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(edit.sites)
    for name in moved:
        expected = before[name].double().numpy() @ edit.matrix(name)
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=1e-6, atol=1e-6)
    others = [
        p.relative_to(tiny_model)
        for p in tiny_model.rglob("*")
        if p.is_file() and str(p.relative_to(tiny_model)) != UNET
    ]
    assert others
    assert all((tiny_model / p).read_bytes() == (tmp_path / "edited" / p).read_bytes() for p in others)
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(tmp_path / "edited", safety_checker=None)


def test_the_concept_becomes_its_target_or_kept_prompts_stay(tiny_model: Path) -> None:
    """At the layers' inputs, as the scales say: W T c near W c* (it was far before), or W T p near W p."""
    gun, sunflower, cat = TextEncoder(tiny_model).embed(["gun", "sunflower", "cat"])
    rows = slice(gun.length - 2, None)
    erased, held = (
        torch.from_numpy(
            erase(tiny_model, replace(OPTIONS, method="uce", regularization=1e-6, keep_scale=s)).tensors["text.transform"]
        )
        for s in (1e-6, 1e6)
    )
    for weight in cross_attention_weights(tiny_model).values():
        w = weight.double()
        target = sunflower.tokens[rows] @ w.T
        before = (gun.tokens[rows] @ w.T - target).norm() / target.norm()
        after = (gun.tokens[rows] @ erased.T @ w.T - target).norm() / target.norm()
        kept = ((cat.tokens @ held.T - cat.tokens) @ w.T).norm() / (cat.tokens @ w.T).norm()
        assert after < 0.1 * before
        assert kept < 0.01


def test_edits_are_deterministic(tiny_model: Path) -> None:
    assert erase(tiny_model, OPTIONS).id == erase(tiny_model, OPTIONS).id
    assert erase(tiny_model, OPTIONS).id != erase(tiny_model, replace(OPTIONS, ridge=0.2)).id


def test_an_empty_target_is_a_space(tiny_model: Path) -> None:
    empty, space = (erase(tiny_model, replace(OPTIONS, to=(to,))) for to in ("", " "))
    np.testing.assert_array_equal(empty.tensors["text.transform"], space.tensors["text.transform"])


def test_an_edit_for_another_model_is_refused(tiny_model: Path, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / UNET)
    edit = erase(tiny_model, OPTIONS)
    tensors[edit.sites[0]] += 1e-3
    save_file(tensors, copy / UNET)
    with pytest.raises(FingerprintMismatch):
        apply_edit(copy, edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    apply_edit(copy, edit, tmp_path / "out", force=True)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"erase": ()}, "nothing to erase"),
        ({"erase": ("  ",)}, "empty"),
        ({"method": "magic"}, "magic"),
        ({"rule": "none"}, "token rule"),
        ({"to": ("a", "b")}, "2 targets for 1"),
        ({"epochs": -1}, "-1"),
        ({"ridge": 0.0}, "ridge"),
        ({"regularization": float("nan")}, "regularization"),
        ({"keep_scale": -1.0}, "keep-scale"),
    ],
)
def test_options_that_cannot_be_used(tiny_model: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        erase(tiny_model, replace(OPTIONS, **change))  # type: ignore[arg-type]


def test_a_prompt_over_the_limit(tiny_model: Path) -> None:
    with pytest.raises(PromptTooLong, match="24"):
        erase(tiny_model, replace(OPTIONS, erase=("gun " * 30,)))


def test_incomplete_folders(tiny_model: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        erase(tmp_path, OPTIONS)
    weights = copy / UNET
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="half-written"):
        erase(copy, OPTIONS)
    weights.unlink()
    with pytest.raises(ModelError, match="is missing"):
        erase(copy, OPTIONS)


def test_a_model_without_cross_attention(copy: Path) -> None:
    tensors = {name: t for name, t in load_file(copy / UNET).items() if "attn2" not in name}
    save_file(tensors, copy / UNET)
    with pytest.raises(NoCrossAttention, match="attn2"):
        erase(copy, OPTIONS)


def test_a_used_output_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        apply_edit(tiny_model, erase(tiny_model, OPTIONS), tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_sharded_weights(tiny_model: Path, copy: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    (copy / UNET).unlink()
    UNet2DConditionModel.from_pretrained(tiny_model / "unet").save_pretrained(copy / "unet", max_shard_size="100KB")
    assert json.loads((copy / f"{UNET}.index.json").read_text())["weight_map"]
    edit = erase(copy, OPTIONS)
    assert edit.id == erase(tiny_model, OPTIONS).id
    apply_edit(copy, edit, tmp_path / "edited")
    edited = cross_attention_weights(tmp_path / "edited")
    assert all(not torch.equal(edited[n], w) for n, w in cross_attention_weights(copy).items())


def test_presets_are_the_published_ones() -> None:
    assert (PRESETS["nudity"].epochs, PRESETS["nudity"].ridge) == (3, 0.1)
    assert len(PRESETS["unsafe"].erase) == len(PRESETS["unsafe"].keep) == 11
    assert PRESETS["artist"].keep_scale is None
    with pytest.raises(UsageError, match="nudity"):
        preset("nothing")
