"""From prompts to an edit and to an edited folder, on a tiny random Stable Diffusion."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.edit.apply import apply_edit, carried, stored_arrays
from excise.edit.cache import EmbeddingCache
from excise.edit.erase import erase
from excise.edit.families import family_of
from excise.edit.model_folder import read_sites
from excise.edit.recipe import Recipe, resolve
from excise.edit.text import load_encoder
from excise.editfile import Edit, load_edit, save_edit
from excise.editstack import stack
from excise.errors import FingerprintMismatch, ModelError, NoCrossAttention, OutputError, PromptTooLong, UsageError

UNET = "unet/diffusion_pytorch_model.safetensors"


def recipe(**changes: object) -> Recipe:
    return resolve(None, None, {"erase": ("gun",), "to": ("sunflower",), "keep": ("cat", "dog"), **changes})


def cross_attention_weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_sites(folder).streams["text"]


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
    edit = erase(tiny_model, recipe(technique=technique))
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
    encoder = load_encoder(tiny_model, family_of(tiny_model))
    gun, sunflower, cat = (each["text"][0] for each in encoder.embed(["gun", "sunflower", "cat"]))
    rows = slice(gun.length - 2, None)
    erased, held = (
        torch.from_numpy(
            erase(tiny_model, recipe(method="uce", regularization=1e-6, keep_scale=s)).tensors["text.transform"]
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
    assert erase(tiny_model, recipe()).id == erase(tiny_model, recipe()).id
    assert erase(tiny_model, recipe()).id != erase(tiny_model, recipe(ridge=0.2)).id


def test_an_empty_target_is_a_space(tiny_model: Path) -> None:
    empty, space = (erase(tiny_model, recipe(to=(to,))) for to in ("", " "))
    np.testing.assert_array_equal(empty.tensors["text.transform"], space.tensors["text.transform"])


def test_an_edit_for_another_model_is_refused(tiny_model: Path, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / UNET)
    edit = erase(tiny_model, recipe())
    tensors[edit.sites[0]] += 1e-3
    save_file(tensors, copy / UNET)
    with pytest.raises(FingerprintMismatch):
        apply_edit(copy, edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    apply_edit(copy, edit, tmp_path / "out", force=True)
    assert (tmp_path / "out").is_dir()


def test_a_prompt_over_the_limit(tiny_model: Path) -> None:
    with pytest.raises(PromptTooLong, match="24"):
        erase(tiny_model, recipe(erase=("gun " * 30,)))


def test_incomplete_folders(tiny_model: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        erase(tmp_path, recipe())
    weights = copy / UNET
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="half-written"):
        erase(copy, recipe())
    weights.unlink()
    with pytest.raises(ModelError, match="is missing"):
        erase(copy, recipe())


def test_a_model_without_cross_attention(copy: Path) -> None:
    tensors = {name: t for name, t in load_file(copy / UNET).items() if "attn2" not in name}
    save_file(tensors, copy / UNET)
    with pytest.raises(NoCrossAttention, match="attn2"):
        erase(copy, recipe())


def test_a_used_output_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        apply_edit(tiny_model, erase(tiny_model, recipe()), tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_sharded_weights(tiny_model: Path, copy: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    (copy / UNET).unlink()
    UNet2DConditionModel.from_pretrained(tiny_model / "unet").save_pretrained(copy / "unet", max_shard_size="100KB")
    assert json.loads((copy / f"{UNET}.index.json").read_text())["weight_map"]
    edit = erase(copy, recipe())
    assert edit.id == erase(tiny_model, recipe()).id
    apply_edit(copy, edit, tmp_path / "edited")
    edited = cross_attention_weights(tmp_path / "edited")
    assert all(not torch.equal(edited[n], w) for n, w in cross_attention_weights(copy).items())


def test_k_or_v_alone_and_chosen_layers(tiny_model: Path) -> None:
    every = set(erase(tiny_model, recipe()).sites)
    keys = erase(tiny_model, recipe(sites={"projections": "k"}))
    values = erase(tiny_model, recipe(sites={"projections": "v"}))
    assert set(keys.sites) == {name for name in every if name.endswith("to_k.weight")}
    assert set(values.sites) == every - set(keys.sites)
    chosen = erase(tiny_model, recipe(sites={"layers": r"^up_blocks"})).sites
    assert set(chosen) == {name for name in every if name.startswith("up_blocks")} != every
    with pytest.raises(UsageError, match="none of the 8"):
        erase(tiny_model, recipe(sites={"layers": "nothing"}))


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "dp", "trce1", "leace"])
def test_every_method_moves_the_concept_and_with_conditional_only_not_the_empty_prompt(
    tiny_model: Path, method: str
) -> None:
    encoder = load_encoder(tiny_model, family_of(tiny_model))
    gun, empty = (each["text"][0].tokens.numpy() for each in encoder.embed(["gun", ""]))

    def moved(edit: Edit, tokens: np.ndarray) -> float:
        change = edit.tensors["text.transform"] - np.eye(edit.metadata.streams[0].dim)
        return float(np.linalg.norm(tokens @ change.T) / np.linalg.norm(tokens))

    # A short keep set leaves directions free: this text encoder is 32 wide.
    plain = erase(tiny_model, recipe(method=method, keep=(), regularization=0.01))
    held = erase(tiny_model, recipe(method=method, keep=(), regularization=0.01, sites={"conditional_only": True}))
    assert moved(plain, gun) > 1e-3
    assert moved(plain, empty) > 1e-6
    assert moved(held, gun) > 1e-3
    assert moved(held, empty) < 1e-12
    assert {name.endswith("to_v.weight") for name in plain.sites} == ({True} if method == "speed" else {True, False})


def test_the_certificate_is_stored_and_falls_with_the_radius(tiny_model: Path) -> None:
    edit = erase(tiny_model, recipe(epochs=2))
    stages = [entry.stage for entry in edit.metadata.certificate]
    assert stages == ["uce", "epoch 1", "epoch 2"]
    for entry in edit.metadata.certificate:
        assert entry.radii == (1.0, 2.0, 4.0)
        assert 0 < entry.errors[0] <= 1
        assert entry.errors[0] >= entry.errors[1] >= entry.errors[2]
        assert len(entry.tokens) == 24
    assert [stage.stage for stage in edit.metadata.stages] == stages
    without = erase(tiny_model, recipe(epochs=2), certificate=False)
    assert not without.metadata.certificate
    np.testing.assert_array_equal(without.tensors["text.transform"], edit.tensors["text.transform"])


def test_auto_epochs_leave_out_the_one_that_does_not_help(tiny_model: Path) -> None:
    edit = erase(tiny_model, recipe(epochs="auto"))
    *kept, last = edit.metadata.stages
    assert all(stage.accepted for stage in kept)
    if not last.accepted:
        assert (last.margin or 0) - (kept[-1].margin or 0) < 0.005
    fixed = erase(tiny_model, recipe(epochs=sum(stage.accepted for stage in edit.metadata.stages) - 1))
    np.testing.assert_array_equal(fixed.tensors["text.transform"], edit.tensors["text.transform"])
    with pytest.raises(UsageError, match="certificate"):
        erase(tiny_model, recipe(epochs="auto"), certificate=False)


def test_a_cached_run_gives_the_same_edit_without_the_text_encoder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    first = erase(tiny_model, recipe(), cache=cache)
    assert first.id == erase(tiny_model, recipe()).id

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the text encoder was built")

    monkeypatch.setattr("excise.edit.erase.load_encoder", refuse)
    assert erase(tiny_model, recipe(), cache=cache).id == first.id
    with pytest.raises(AssertionError, match="was built"):
        erase(tiny_model, recipe(keep=("tree",)), cache=cache)


@pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "tokenizer/vocab.json"])
def test_a_text_encoder_that_is_written_to_meanwhile_is_refused(
    copy: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprint, which the edit and the cache go by, is that of the files before."""
    cache = EmbeddingCache(tmp_path / "cache")

    def written_to(*arguments: Any, **options: Any) -> Any:
        os.utime(copy / name, ns=(1, 1))
        return load_encoder(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("excise.edit.erase.load_encoder", written_to)
        with pytest.raises(ModelError, match="text encoder's files changed while they were read: run it again"):
            erase(copy, recipe(), cache=cache)
    assert not list((tmp_path / "cache").rglob("*.entry"))
    assert erase(copy, recipe(), cache=cache).id


def test_many_concepts_and_a_long_keep_file(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "artists.csv").write_text("name,born\n" + "".join(f"artist number {n},1900\n" for n in range(60)))
    (tmp_path / "keep.txt").write_text("".join(f"a picture of thing {n}\n" for n in range(300)))
    many = recipe(
        erase=None, to=("art",), erase_files=(f"{tmp_path}/artists.csv:name",), keep=None,
        keep_files=(f"{tmp_path}/keep.txt",), expand="artist", epochs=1,
    )  # fmt: skip
    edit = erase(tiny_model, many)
    assert len(edit.metadata.concepts) == 360
    assert edit.metadata.concepts[1].erase == "painting by artist number 0"
    assert edit.metadata.kept.count == 300
    assert edit.metadata.stages[1].residual is not None


def test_stacked_edits(tiny_model: Path, tmp_path: Path) -> None:
    first = erase(tiny_model, recipe())
    apply_edit(tiny_model, first, tmp_path / "once")
    second = erase(tmp_path / "once", recipe(erase=("knife",), sites={"projections": "v"}, technique="tensor"))
    assert second.metadata.on == (first.id,)
    apply_edit(tmp_path / "once", second, tmp_path / "twice")
    assert carried(tmp_path / "twice") == (first.id, second.id)
    both = stack([first, second], stored_arrays(tiny_model, first.sites))
    apply_edit(tiny_model, both, tmp_path / "stacked")
    one, other = (load_file(tmp_path / name / UNET) for name in ("twice", "stacked"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-5)
    save_edit(tmp_path / "both.safetensors", both)
    assert load_edit(tmp_path / "both.safetensors").id == both.id
    with pytest.raises(FingerprintMismatch, match="carries"):
        apply_edit(tiny_model, second, tmp_path / "wrong")
    with pytest.raises(FingerprintMismatch, match="carries this edit already"):
        apply_edit(tmp_path / "once", first, tmp_path / "wrong")
    with pytest.raises(FingerprintMismatch, match="edit 1 "):
        stack([second, first], stored_arrays(tiny_model, first.sites))


def test_pickles_and_other_variants_are_left_out(copy: Path, tmp_path: Path) -> None:
    """They would bring the concept back."""
    shutil.copy(copy / UNET, copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    shutil.copy(copy / UNET, copy / "model.safetensors")
    (copy / "NOTES.md").write_text("mine")
    apply_edit(copy, erase(copy, recipe()), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "unet").glob("diffusion*")] == [Path(UNET).name]
    assert (tmp_path / "out" / "NOTES.md").read_text() == "mine"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle only"):
        apply_edit(copy, erase(copy, recipe()), tmp_path / "no-vae")


def test_an_unknown_device(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="--device nothing"):
        erase(tiny_model, recipe(), device="nothing")
