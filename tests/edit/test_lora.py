"""The LoRA of an edit against the edited UNet, read by diffusers' own code and by kohya's rules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.utils.peft_utils import get_peft_kwargs
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from excise.edit.lora import Lora, diffusers_state, kohya_metadata, kohya_state, lora, save_lora
from excise.edit.rece import rece
from excise.edit.tokens import Concept
from excise.edit.transform import Transform
from excise.edit.uce import Scales, uce
from excise.errors import NumericsError, OutputError, UsageError

D = 12
State = Mapping[str, Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def stack(parts: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """All the products, float64, below each other."""
    return torch.cat([up.double() @ down.double() for up, down in parts.values()])


def problem(seed: int, rank: int) -> tuple[dict[str, Tensor], Callable[[str], tuple[Tensor, Tensor]], Tensor]:
    """Weights of three heights, factors of that rank, and the exact change of all weights."""
    weights = {f"m{o}.weight": normal(seed + o, o, D) for o in (5, 9, 30)}
    left, right = normal(seed, D, rank), normal(seed + 1, rank, D)
    exact = torch.cat([weight @ left @ right for weight in weights.values()])
    return weights, lambda name: (left, right), exact


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 2 * D))
def test_the_exact_rank_is_exact(seed: int, rank: int) -> None:
    weights, factors, exact = problem(seed, rank)
    made = lora(weights, factors, dtype=torch.float64)
    assert relative(stack(made.factors), exact) < 1e-13
    # More factors than the weights have columns don't make the file larger.
    assert made.rank == min(rank, D)
    stored = lora(weights, factors)
    # Measured over 500 draws: 4.3e-8 at worst.
    assert stored.error < 1e-7
    assert stored.error == pytest.approx(relative(stack(stored.factors), exact), rel=1e-6)
    assert all(
        part.dtype == torch.float32 and part.is_contiguous() for pair in stored.factors.values() for part in pair
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 6))
def test_a_lower_rank_is_the_best_of_that_rank(seed: int, rank: int) -> None:
    """Eckart and Young: what is missed are the singular values beyond the rank, of each weight."""
    weights, factors, exact = problem(seed, 7)
    left, right = factors("")
    beyond = sum(float(torch.linalg.svdvals(w @ left @ right)[rank:].square().sum()) for w in weights.values())
    made = lora(weights, factors, rank=rank, dtype=torch.float64)
    assert made.rank == rank
    assert made.error == pytest.approx(math.sqrt(beyond) / float(exact.norm()), rel=1e-10, abs=1e-14)
    assert made.error <= lora(weights, factors, rank=max(1, rank - 1)).error
    for up, down in made.factors.values():
        # Each factor has the roots of the singular values.
        torch.testing.assert_close(up.T @ up, down @ down.T, rtol=0, atol=1e-11 * float(up.square().sum()))


def test_all_weights_get_one_rank_and_unused_columns_are_zero() -> None:
    weights, factors, _ = problem(3, 8)
    weights["none.weight"] = torch.zeros(4, D)
    made = lora(weights, factors)
    assert {down.shape for _, down in made.factors.values()} == {(8, D)}
    up, down = made.factors["m5.weight"]
    assert not up[:, 5:].any()
    assert not down[5:].any()
    assert not stack({"none": made.factors["none.weight"]}).any()
    assert made.error < 2e-7


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 6e-4), (torch.bfloat16, 5e-3)])
def test_a_narrow_dtype_is_reported_in_the_error(dtype: torch.dtype, bound: float) -> None:
    weights, factors, exact = problem(0, 4)
    made = lora(weights, factors, dtype=dtype)
    assert made.error == pytest.approx(relative(stack(made.factors), exact), rel=1e-9)
    assert bound / 10 < made.error < bound


def test_every_weight_may_have_its_own_factors() -> None:
    weights = {f"m{i}.weight": normal(i, 20, D) for i in range(3)}
    own = {name: (normal(10 + i, D, i + 1), normal(20 + i, i + 1, D)) for i, name in enumerate(weights)}
    made = lora(weights, own.__getitem__, dtype=torch.float64)
    exact = torch.cat([weight @ own[name][0] @ own[name][1] for name, weight in weights.items()])
    assert made.rank == 3
    assert relative(stack(made.factors), exact) < 1e-13


# A UNet: both layouts, as their readers apply them.


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_model / "unet").eval()


def sites(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return {n: w.detach() for n, w in unet.state_dict().items() if re.search(r"\.attn2\.to_[kv]\.weight$", n)}


@pytest.fixture(scope="module")
def transform(base: UNet2DConditionModel) -> Transform:
    """Three tokens of UCE and two RECE epochs on them: rank 9 of 32."""
    weights = list(sites(base).values())
    concept = Concept(normal(1, 3, 32), normal(2, 3, 32), tokens_length=2, target_length=2)
    published = Scales(1, keep=0.1, ridge=0.1)
    return rece(
        weights, [concept], [], uce_scales=published, epoch_scales=published, epochs=2, ridge=0.1
    ).transform.collapse()


@pytest.fixture(scope="module")
def made(base: UNet2DConditionModel, transform: Transform) -> Lora:
    factors = transform.factors()
    return lora(sites(base), lambda name: factors)


def outputs(unet: UNet2DConditionModel) -> Tensor:
    sample, text = normal(5, 2, 4, 8, 8).float(), normal(6, 2, 7, 32).float()
    with torch.no_grad():
        return torch.as_tensor(unet(sample, 500, encoder_hidden_states=text).sample)


def copy_of(unet: UNet2DConditionModel, changed: State) -> UNet2DConditionModel:
    copied = UNet2DConditionModel.from_config(unet.config).eval()
    copied.load_state_dict({**unet.state_dict(), **changed})
    return copied


@pytest.fixture(scope="module")
def wanted(base: UNet2DConditionModel, transform: Transform) -> Tensor:
    edited = outputs(copy_of(base, {name: transform.on_weight(weight) for name, weight in sites(base).items()}))
    assert relative(outputs(base), edited) > 1e-2, "the edit doesn't show"
    return edited


def as_peft_applies(unet: UNet2DConditionModel, state: State, alphas: Mapping[str, float] | None) -> dict[str, Tensor]:
    """Weights after ``load_lora_adapter`` of diffusers 0.39, with PEFT's ``W + alpha / r · B A``."""
    state = {name.removeprefix("unet."): part for name, part in state.items()}
    if "lora_A" not in next(iter(state)):
        state = convert_unet_state_dict_to_peft(state)
    ranks = {f"^{name}": part.shape[1] for name, part in state.items() if "lora_B" in name}
    alphas = {name.removeprefix("unet."): alpha for name, alpha in (alphas or {}).items()}
    config: dict[str, Any] = get_peft_kwargs(ranks, alphas, state)

    def value(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)

    applied = {}
    weights = unet.state_dict()
    for module in config["target_modules"]:
        scale = value(config["alpha_pattern"], module, config["lora_alpha"])
        scale /= value(config["rank_pattern"], module, config["r"])
        change = state[f"{module}.lora_B.weight"].double() @ state[f"{module}.lora_A.weight"].double()
        applied[f"{module}.weight"] = (weights[f"{module}.weight"].double() + scale * change).float()
    return applied


def test_the_diffusers_file_is_the_edit(tmp_path: Path, base: UNet2DConditionModel, made: Lora, wanted: Tensor) -> None:
    save_lora(tmp_path / "edit.safetensors", diffusers_state(made))
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(tmp_path), weight_name="edit.safetensors")
    assert alphas is None
    assert all("lora" in name for name in state), "load_lora_weights refuses such a file"
    applied = as_peft_applies(base, state, alphas)
    assert applied.keys() == sites(base).keys()
    # Measured: 7e-7, in float32 throughout.
    assert relative(outputs(copy_of(base, applied)), wanted) < 5e-6


def test_the_kohya_file_is_the_edit_to_diffusers(
    tmp_path: Path, base: UNet2DConditionModel, made: Lora, wanted: Tensor
) -> None:
    save_lora(tmp_path / "edit.safetensors", kohya_state(made), kohya_metadata(made, "sd_v1"))
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(tmp_path), weight_name="edit.safetensors")
    assert set(alphas.values()) == {float(made.rank)}
    applied = as_peft_applies(base, state, alphas)
    assert applied.keys() == sites(base).keys()
    assert relative(outputs(copy_of(base, applied)), wanted) < 5e-6


def test_the_kohya_file_is_the_edit_by_kohyas_rule(
    tmp_path: Path, base: UNet2DConditionModel, made: Lora, wanted: Tensor
) -> None:
    """sd-scripts, A1111 and ComfyUI: ``lora_unet_`` and the module's name with underscores, scale alpha / rank."""
    path = tmp_path / "edit.safetensors"
    save_lora(path, kohya_state(made), kohya_metadata(made, "sd_v1"))
    state, applied = load_file(path), {}
    for name, weight in base.state_dict().items():
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{stem}.alpha" in state:
            up, down, alpha = (state.pop(f"{stem}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            applied[name] = weight + alpha / down.shape[0] * (up @ down)
    assert not state
    # Measured: 7e-7.
    assert relative(outputs(copy_of(base, applied)), wanted) < 5e-6
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(made.rank),
            "ss_network_alpha": str(made.rank),
            "ss_base_model_version": "sd_v1",
        }
    assert "ss_base_model_version" not in kohya_metadata(made)


def test_the_names_that_a1111_and_comfyui_look_up(made: Lora) -> None:
    names = kohya_state(made).keys()
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight" in names
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.lora_down.weight" in names
    assert "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k.alpha" in names
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight" in diffusers_state(made)
    flux = Lora({"context_embedder.weight": (torch.ones(3, 1), torch.ones(1, 4))}, 0.0)
    assert diffusers_state(flux, "transformer").keys() == {
        "transformer.context_embedder.lora_A.weight",
        "transformer.context_embedder.lora_B.weight",
    }


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_unequal_ranks_would_be_read_wrongly(
    base: UNet2DConditionModel, made: Lora, wanted: Tensor, layout: str
) -> None:
    """Why all weights get one rank: the same products with one rank doubled are no longer the edit to diffusers."""
    name = next(iter(made.factors))
    up, down = made.factors[name]
    wider = {name: (torch.cat([up, 0 * up], 1), torch.cat([down, 0 * down]))}
    uneven = Lora({**made.factors, **wider}, made.error)
    assert torch.equal(stack(uneven.factors), stack(made.factors))
    if layout == "diffusers":
        applied = as_peft_applies(base, diffusers_state(uneven), None)
    else:
        state = kohya_state(uneven)
        for module, (_, own) in uneven.factors.items():
            stem = "lora_unet_" + module.removesuffix(".weight").replace(".", "_")
            state[f"{stem}.alpha"] = torch.tensor(float(own.shape[0]))
        applied = as_peft_applies(base, *_convert_non_diffusers_lora_to_diffusers(state))
    assert relative(outputs(copy_of(base, applied)), wanted) > 1e-3


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_load_lora_weights(tmp_path: Path, tiny_model: Path, made: Lora, wanted: Tensor, layout: str) -> None:
    """The real thing: a pipeline loads the file and its UNet gives the edited outputs."""
    pytest.importorskip("peft", reason="PEFT isn't installed: pipe.load_lora_weights needs it")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    plain = outputs(pipe.unet)
    state = diffusers_state(made) if layout == "diffusers" else kohya_state(made)
    save_lora(tmp_path / "edit.safetensors", state)
    pipe.load_lora_weights(str(tmp_path), weight_name="edit.safetensors")
    assert relative(plain, wanted) > 1e-2
    assert relative(outputs(pipe.unet), wanted) < 1e-5
    pipe.unload_lora_weights()
    assert relative(outputs(pipe.unet), plain) < 1e-6


def test_a_per_site_edit(base: UNet2DConditionModel) -> None:
    """Technique ``tensor`` has another T for every weight; each is a LoRA too."""
    weights = sites(base)
    concept = Concept(normal(1, 3, 32), normal(2, 3, 32), tokens_length=2, target_length=2)
    edit = uce(list(weights.values()), [concept], [], scales=Scales(1, keep=0.1, ridge=0.1), technique="tensor")
    assert not edit.is_shared
    order = {name: number for number, name in enumerate(weights)}
    made = lora(weights, lambda name: edit.factors(order[name]))
    for name, weight in weights.items():
        up, down = made.factors[name]
        assert (
            relative(weight.double() + up.double() @ down.double(), edit.on_weight(weight.double(), order[name])) < 1e-7
        )


def test_refusals(tmp_path: Path) -> None:
    weights, factors, _ = problem(0, 3)
    with pytest.raises(UsageError, match="no weights"):
        lora({}, factors)
    with pytest.raises(UsageError, match="a LoRA of rank 0"):
        lora(weights, factors, rank=0)
    with pytest.raises(UsageError, match="moves none of these weights"):
        lora(weights, lambda name: (torch.zeros(D, 0), torch.zeros(0, D)))
    with pytest.raises(UsageError, match=r"have shapes \(5, 12\), \(12, 3\), \(2, 12\)"):
        lora(weights, lambda name: (torch.ones(D, 3), torch.ones(2, D)))
    with pytest.raises(NumericsError, match="inf or nan"):
        lora(weights, lambda name: (torch.full((D, 1), math.nan), torch.ones(1, D)))
    with pytest.raises(NumericsError, match=r"isn't finite in torch\.float16: use float32"):
        lora(weights, lambda name: (torch.full((D, 1), 1e12), torch.ones(1, D)), dtype=torch.float16)
    made = lora(weights, factors)
    with pytest.raises(UsageError, match=r"m5\.weight is in no block of a UNet"):
        kohya_state(made)
    with pytest.raises(UsageError, match="'bias' isn't a module's weight"):
        diffusers_state(Lora({"bias": (torch.ones(2, 1), torch.ones(1, 2))}, 0.0))
    with pytest.raises(UsageError, match="must end in"):
        save_lora(tmp_path / "edit.ckpt", {})
    path = tmp_path / "edit.safetensors"
    save_lora(path, diffusers_state(made))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        save_lora(path, diffusers_state(made))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["edit.safetensors"]
