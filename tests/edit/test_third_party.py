"""Checkpoints in every layout that other programs write, and the edit found in them again."""

from __future__ import annotations

import io
import os
import pickle
import re
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from excise.edit.checkpoint import Checkpoint, read_checkpoint
from excise.edit.third_party import compare
from excise.edit.tokens import Concept
from excise.edit.transform import Transform
from excise.edit.uce import Scales, uce
from excise.errors import EditError, UsageError

Weights = dict[str, Tensor]
SITE = re.compile(r"\.attn2\.to_[kv]\.weight$")
LDM = "model.diffusion_model."
#: Stable Diffusion 1.x: what ``config.json`` says of its blocks.
SD1 = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def unet(tiny_model: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_model / "unet")


@pytest.fixture(scope="module")
def base(unet: UNet2DConditionModel) -> Weights:
    return {name: weight.detach().clone() for name, weight in unet.state_dict().items()}


@pytest.fixture(scope="module")
def transform(base: Weights) -> Transform:
    """UCE on three tokens: T − I has rank 3 of 32."""
    concept = Concept(normal(1, 4, 32), normal(2, 4, 32), tokens_length=3, target_length=3)
    weights = [weight for name, weight in base.items() if SITE.search(name)]
    return uce(weights, [concept], [normal(3, 5, 32)], scales=Scales(1, keep=0.1, ridge=0.5))


@pytest.fixture(scope="module")
def edited(base: Weights, transform: Transform) -> Weights:
    """The whole UNet after the edit."""
    return {name: transform.on_weight(weight) if SITE.search(name) else weight for name, weight in base.items()}


def only_sites(weights: Weights) -> Weights:
    return {name: weight.contiguous() for name, weight in weights.items() if SITE.search(name)}


def to_ldm(names: list[str], layers: int) -> dict[str, str]:
    """diffusers' name → the original name, from the layout of CompVis' ``UNetModel``, not from diffusers' converter.

    Blocks are numbered through; at each place 0 is the ResNet, 1 the attention, and the last one resamples.
    """
    plain = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    attended = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions", name)}
    found = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        if module in plain:
            found[name] = f"{plain[module]}.{kind}"
            continue
        side, *rest = name.split(".")
        if side == "mid_block":
            what, index, *tail = rest
            place = "middle_block." + str(1 if what == "attentions" else 2 * int(index))
        else:
            block, what, index, *tail = rest
            width, first = layers + 1, 1 if side == "down_blocks" else 0
            within = layers if "samplers" in what else int(index)
            part = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(what, 1 + (block in attended))
            number = first + int(block) * width + within
            place = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}.{part}"
        ending = ".".join(tail)
        if what == "resnets":
            ending = inner[tail[0]] + "." + tail[1]
        if what == "downsamplers":
            ending = "op." + tail[1]
        found[name] = f"{place}.{ending}"
    return found


def ldm(weights: Weights, names: Mapping[str, str], prefix: str = LDM) -> Weights:
    return {prefix + names[name]: weight for name, weight in weights.items()}


def saved(path: Path, content: Any, **options: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path, **options)
    return path


#: What is written, by the file's name: the whole UNet and the sites alone.
LAYOUTS: dict[str, Callable[[Weights, Weights], Any]] = {
    "rece.pt": lambda full, sites: full,
    "old.pth": lambda full, sites: full,
    "wrapped.ckpt": lambda full, sites: {"state_dict": full, "epoch": 3},
    "unet.bin": lambda full, sites: {"unet": full},
    "twice.pt": lambda full, sites: {"state_dict": {"unet": sites}},
    "module.pt": lambda full, sites: {f"module.{name}": weight for name, weight in full.items()},
    "parameters.pt": lambda full, sites: {name: torch.nn.Parameter(weight) for name, weight in sites.items()},
    "full.safetensors": lambda full, sites: full,
    "uce.safetensors": lambda full, sites: sites,
    "prefixed.safetensors": lambda full, sites: {f"unet.{name}": weight for name, weight in sites.items()},
    "bare.safetensors": lambda full, sites: {n.removesuffix(".weight"): weight for n, weight in sites.items()},
    "both.safetensors": lambda full, sites: {f"unet.{n.removesuffix('.weight')}": w for n, w in sites.items()},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_edit_comes_back_from_every_layout(
    tmp_path: Path, base: Weights, edited: Weights, transform: Transform, name: str
) -> None:
    content = LAYOUTS[name](edited, only_sites(edited))
    path = saved(tmp_path / name, content, **({"_use_new_zipfile_serialization": False} if name == "old.pth" else {}))
    check(base, read_checkpoint(path), edited, transform)


@pytest.mark.parametrize("name", ["full.ckpt", "full.safetensors", "sites.ckpt", "sites.safetensors", "bare.pt"])
def test_the_edit_comes_back_from_the_original_names(
    tmp_path: Path, unet: UNet2DConditionModel, base: Weights, edited: Weights, transform: Transform, name: str
) -> None:
    names = to_ldm(list(base), 1)
    content = ldm(edited if name.startswith("full") else only_sites(edited), names, "" if name == "bare.pt" else LDM)
    if name.startswith("full"):
        # What else a full checkpoint holds: no part of the denoiser.
        content |= {"first_stage_model.conv.weight": torch.ones(2), "cond_stage_model.transformer.x": torch.ones(2)}
        content |= {f"model_ema.{i}": torch.ones(1) for i in range(120)} | {"betas": torch.ones(3)}
    path = saved(tmp_path / name, {"state_dict": content} if name == "full.ckpt" else content)
    check(base, read_checkpoint(path, unet.config), edited, transform)
    with pytest.raises(EditError, match=r"has the original names of Stable Diffusion: give the config\.json"):
        read_checkpoint(path)


def check(base: Weights, read: Checkpoint, edited: Weights, transform: Transform) -> None:
    """Every weight as it was written, and the one matrix found again."""
    assert set(read) in (set(edited), set(only_sites(edited)))
    assert list(read) == sorted(read)
    assert all(torch.equal(weight, edited[name]) and not weight.requires_grad for name, weight in read.items())
    found = compare(base, read)
    assert found.compared == len(read)
    assert set(found.moved) == set(found.sites) == set(only_sites(edited))
    assert found.shared is not None
    assert found.shared.dtype == torch.float64
    # Measured: 2.2e-8, and 1.2e-7 of the movement left out, of weights rounded to float32.
    assert relative(found.shared, transform.matrix()) < 1e-7
    assert found.residual is not None
    assert found.residual < 1e-6
    assert found.rank == 3
    assert found.deltas == {}
    sizes = {name: weight.numel() for name, weight in base.items()}
    assert found.share == sum(sizes[name] for name in found.moved) / sum(sizes.values())


@cache
def sd1_names() -> dict[str, str]:
    """diffusers' name → the original name, of all 686 weights of Stable Diffusion 1.x."""
    with torch.device("meta"):
        names = list(UNet2DConditionModel.from_config({**SD1, "attention_head_dim": 8}).state_dict())
    return to_ldm(names, 2)


def test_known_names_of_stable_diffusion() -> None:
    """The renaming that these tests use, held to names as they stand in sd-v1-4.ckpt, and to the whole converter."""
    names = sd1_names()
    assert len(names) == 686
    block = "transformer_blocks.0.attn2.to_k.weight"
    assert names[f"down_blocks.0.attentions.0.{block}"] == f"input_blocks.1.1.{block}"
    assert names[f"down_blocks.2.attentions.1.{block}"] == f"input_blocks.8.1.{block}"
    assert names[f"mid_block.attentions.0.{block}"] == f"middle_block.1.{block}"
    assert names[f"up_blocks.3.attentions.2.{block}"] == f"output_blocks.11.1.{block}"
    assert names["down_blocks.0.downsamplers.0.conv.weight"] == "input_blocks.3.0.op.weight"
    assert names["up_blocks.0.upsamplers.0.conv.weight"] == "output_blocks.2.1.conv.weight"
    assert names["up_blocks.1.upsamplers.0.conv.weight"] == "output_blocks.5.2.conv.weight"
    assert names["up_blocks.3.resnets.2.conv_shortcut.bias"] == "output_blocks.11.0.skip_connection.bias"
    full = convert_ldm_unet_checkpoint({LDM + old: new for new, old in names.items()}, SD1)
    assert full == {name: name for name in names}, "the full converter disagrees"


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(places=[682])
@given(places=st.lists(st.integers(0, 685), min_size=1, max_size=6, unique=True))
def test_any_part_of_stable_diffusion_is_renamed_as_the_whole(tmp_path: Path, places: list[int]) -> None:
    names = sd1_names()
    some = [list(names)[place] for place in places]
    path = tmp_path / "part.safetensors"
    save_file({LDM + names[name]: torch.tensor(float(number)) for number, name in enumerate(some)}, path)
    read = read_checkpoint(path, SD1)
    expected = {name: number for number, name in enumerate(some)}
    assert {name: int(weight) for name, weight in read.items()} == expected


def test_the_names_of_sdxl(tmp_path: Path) -> None:
    """A part of SDXL without its time embedding, and with the label embedding that its config asks for."""
    config = {"block_out_channels": [320, 640, 1280], "layers_per_block": 2, "addition_embed_type": "text_time"}
    block = "transformer_blocks.9.attn2.to_v.weight"
    names = {f"{LDM}input_blocks.8.1.{block}": 1.0, f"{LDM}label_emb.0.2.weight": 2.0}
    path = saved(tmp_path / "part.safetensors", {name: torch.tensor(value) for name, value in names.items()})
    read = read_checkpoint(path, config)
    assert dict(read) == {f"down_blocks.2.attentions.1.{block}": 1.0, "add_embedding.linear_2.weight": 2.0}


# What moved.


def test_a_change_by_gradients_is_kept_as_differences(base: Weights, transform: Transform) -> None:
    """ESD-like: one matrix doesn't explain what moved in attn2, and other layers move too."""
    moved = [name for name in base if "attn" in name and name.endswith("weight")]
    new = {name: base[name] + 0.02 * normal(i, *base[name].shape).float() for i, name in enumerate(moved)}
    found = compare(base, {**base, **new})
    assert set(found.moved) == set(found.deltas) == set(moved)
    assert set(found.sites) == set(only_sites(base))
    assert found.shared is None
    assert found.rank is None
    assert found.residual is not None
    assert found.residual > 0.5
    assert all(torch.equal(found.deltas[name], (new[name].double() - base[name].double()).float()) for name in moved)
    assert "share no matrix" in found.report[1]
    assert found.largest[1] == pytest.approx(max(relative(new[n] + 0.0, base[n]) for n in moved), rel=1e-5)


def test_a_shared_matrix_and_other_weights_together(base: Weights, edited: Weights, transform: Transform) -> None:
    other = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    found = compare(base, {**edited, other: 2 * base[other]})
    assert found.shared is not None
    assert relative(found.shared, transform.matrix()) < 1e-6
    assert found.deltas.keys() == {other}
    assert torch.equal(found.deltas[other], base[other])
    assert found.report[
        0
    ] == f"{len(base)} weights compared, {len(found.moved)} moved ({100 * found.share:.3g} % of " + ("the parameters)")
    assert re.fullmatch(
        r"\d+ of them read the text and share one matrix of rank 3 \(.* of a movement left out\)", found.report[1]
    )
    assert found.report[2] == "1 kept as differences"
    assert found.report[3].startswith("largest relative change ")


def test_one_site_apart_is_enough_to_keep_all_as_differences(base: Weights, edited: Weights) -> None:
    """A hundredth of the movement of all sites, in one of them: it must not be averaged away."""
    names = sorted(only_sites(base))
    last = names[-1]
    step = edited[last] - base[last]
    apart = normal(9, *step.shape).float()
    new = {**edited, last: edited[last] + 0.05 * step.norm() * apart / apart.norm()}
    found = compare(base, new)
    assert found.shared is None
    assert found.residual == pytest.approx(0.05, rel=0.3)
    assert found.deltas.keys() == set(names)
    looser = compare(base, new, tolerance=0.1)
    assert looser.shared is not None
    assert looser.deltas == {}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_a_half_precision_checkpoint(
    base: Weights, edited: Weights, transform: Transform, dtype: torch.dtype, bound: float
) -> None:
    """Weights that only lost precision didn't move, and the matrix is found as well as the dtype allows."""
    narrow = {name: weight.to(dtype) for name, weight in edited.items()}
    for known in (base, {name: weight.to(dtype) for name, weight in base.items()}):
        found = compare(known, narrow)
        assert set(found.moved) == set(only_sites(base))
        assert found.shared is not None
        # Measured: 1.1e-4 and 9e-4.
        assert relative(found.shared, transform.matrix()) < bound
        assert found.rank == 3
    # The other way round: a base that lost precision.
    assert set(compare({n: w.to(dtype) for n, w in base.items()}, edited).moved) == set(only_sites(base))


def test_a_small_edit_in_half_precision_is_as_good_as_its_rounding(base: Weights, transform: Transform) -> None:
    """Movements near float16's rounding: T can't explain a hundredth of them, and that isn't held against it."""
    small = torch.eye(32, dtype=torch.float64) + 1e-2 * (transform.matrix() - torch.eye(32, dtype=torch.float64))
    sites = {name: (weight.double() @ small).half() for name, weight in only_sites(base).items()}
    found = compare(base, sites)
    assert found.shared is not None
    assert found.residual is not None
    assert found.residual > 1e-2
    assert relative(found.shared, small) < 1e-3


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 10))
def test_the_matrix_and_its_rank_in_float64(seed: int, rank: int) -> None:
    base = {f"{i}.attn2.to_k.weight": normal(seed + i, o, 12) for i, o in enumerate((5, 30, 8))}
    matrix = torch.eye(12, dtype=torch.float64) + normal(seed, 12, rank) @ normal(seed + 9, rank, 12)
    found = compare(base, {name: weight @ matrix for name, weight in base.items()})
    assert found.shared is not None
    # Measured over 500 draws: 3.3e-15 at worst.
    assert relative(found.shared, matrix) < 1e-13
    assert found.rank == rank


def test_dead_directions_are_left_alone() -> None:
    """Weights that ignore three directions of the text: T is the identity there."""
    alive = torch.linalg.qr(normal(0, 12, 9)).Q
    base = {f"{i}.attn2.to_v.weight": normal(i, 20, 9) @ alive.T for i in range(3)}
    matrix = torch.eye(12, dtype=torch.float64) + normal(5, 12, 2) @ normal(6, 2, 12)
    found = compare(base, {name: weight @ matrix for name, weight in base.items()})
    assert found.shared is not None
    identity = torch.eye(12, dtype=torch.float64)
    assert relative(found.shared - identity, alive @ alive.T @ (matrix - identity)) < 1e-12


def test_too_few_rows_prove_nothing() -> None:
    """Any change of a flat weight is a multiplication: that isn't evidence of one."""
    base = {"a.attn2.to_k.weight": normal(0, 5, 12), "a.attn2.to_v.weight": normal(1, 5, 12)}
    found = compare(base, {name: weight + normal(2, 5, 12) for name, weight in base.items()})
    assert found.shared is None
    assert found.residual is None
    assert found.deltas.keys() == base.keys()
    assert "share no matrix (undetermined)" in found.report[1]


def test_the_published_float32_code_is_recognised() -> None:
    """UCE as published: for each layer its own float32 sums and an explicit inverse. One matrix nearly fits."""
    d, generator = 256, torch.Generator().manual_seed(0)
    mean = torch.randn(d, generator=generator)
    source, target, kept = (0.8 * mean + 0.6 * torch.randn(40, d, generator=generator) for _ in range(3))
    base = {
        f"{i}.attn2.to_k.weight": 0.03 * torch.randn(o, d, generator=generator) for i, o in enumerate((320, 640, 640))
    }
    new = {}
    for name, weight in base.items():
        left, right = 0.5 * weight, 0.5 * torch.eye(d)
        for tokens, aims in ((source, target), (kept, kept)):
            left = left + (aims @ weight.T).T @ tokens
            right = right + tokens.T @ tokens
        new[name] = left @ torch.inverse(right)
    found = compare(base, new)
    assert found.shared is not None
    assert found.residual is not None
    # Measured: 3.2e-4 here, and 2.6e-3 at d = 768.
    assert 1e-5 < found.residual < 5e-3
    assert found.rank is not None
    assert found.rank <= 40


def test_memory_is_a_few_weights() -> None:
    """Both sides are read lazily: this pair, the last one, and the last of the first pass."""

    class Lazy(Mapping[str, Tensor]):
        alive = peak = 0

        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __iter__(self) -> Iterator[str]:
            return (f"{i}.attn2.to_k.weight" for i in range(20))

        def __len__(self) -> int:
            return 20

        def __getitem__(self, name: str) -> Tensor:
            if name not in set(self):
                raise KeyError(name)
            tensor = self.scale * normal(int(name.split(".")[0]), 6, 8)
            Lazy.alive += 1
            Lazy.peak = max(Lazy.peak, Lazy.alive)
            weakref.finalize(tensor, self.gone)
            return tensor

        @staticmethod
        def gone() -> None:
            Lazy.alive -= 1

    found = compare(Lazy(1.0), Lazy(3.0))
    assert found.shared is not None
    assert relative(found.shared, 3 * torch.eye(8)) < 1e-13
    assert Lazy.alive == 0
    assert Lazy.peak <= 6


def test_sites_may_be_named(base: Weights, edited: Weights) -> None:
    found = compare(base, edited, sites=())
    assert found.sites == ()
    assert found.deltas.keys() == set(only_sites(base))
    flux = {"context_embedder.weight": normal(0, 20, 6)}
    named = compare(flux, {name: 2 * weight for name, weight in flux.items()}, sites=list(flux))
    assert named.sites == tuple(flux)
    assert named.shared is not None


def test_what_compare_refuses(base: Weights, edited: Weights) -> None:
    name = next(iter(only_sites(base)))
    with pytest.raises(EditError, match=r"none of the checkpoint's \d+ weights differs .*: nothing to import"):
        compare(base, base)
    with pytest.raises(EditError, match="none of the checkpoint's 0 weights"):
        compare(base, {})
    alien = {f"double_blocks.{i}.weight": torch.ones(2) for i in range(5)}
    with pytest.raises(EditError, match=r"5 of 6 weights aren't .*'double_blocks\.2\.weight' and 2 more"):
        compare(base, {**alien, name: edited[name]})
    with pytest.raises(EditError, match=r"has shape \(2, 2\), the base model's"):
        compare(base, {name: torch.ones(2, 2)})
    with pytest.raises(EditError, match="holds inf or nan"):
        compare(base, {name: base[name] / 0})
    two = {"a.attn2.to_k.weight": normal(0, 9, 4), "b.attn2.to_k.weight": normal(1, 9, 5)}
    with pytest.raises(UsageError, match=r"reads text of width 5, .* of 4: give one stream"):
        compare(two, {key: 2 * weight for key, weight in two.items()})


# Files of unknown origin.


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("name", ["new.pt", "old.ckpt", "raw.bin", "protocol4.pth"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / name
    content = {"a.attn2.to_k.weight": torch.ones(2, 2), "x": Bomb(sentinel)}
    if name == "raw.bin":
        path.write_bytes(pickle.dumps(Bomb(sentinel), protocol=2))
    elif name == "protocol4.pth":
        path.write_bytes(pickle.dumps(Bomb(sentinel), protocol=4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name == "new.pt")
    # The environment can't turn the protection off.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(EditError, match="opening it could run code, so it wasn't; get it as safetensors") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    if name != "protocol4.pth":
        assert ".mkdir: opening" in str(caught.value)
    assert not sentinel.exists()
    # The bomb is live.
    if name == "raw.bin":
        pickle.loads(path.read_bytes())
        assert sentinel.exists()


def hostile(kind: str) -> bytes:
    """Contents of files that must be refused."""
    stream = io.BytesIO()
    torch.save({"a.weight": torch.ones(50, 50)}, stream)
    whole = stream.getvalue()
    if kind == "truncated":
        return whole[: len(whole) // 2]
    if kind == "compressed":
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        return packed.getvalue()
    if kind == "script":
        # What tells a TorchScript program from weights.
        with zipfile.ZipFile(stream, "a") as archive:
            archive.writestr("archive/constants.pkl", b"")
        return stream.getvalue()
    return {
        "empty": b"",
        "garbage": bytes(range(256)) * 4,
        "zip": b"PK\x03\x04" + bytes(99),
        "text": b"<html>404</html>",
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "compressed", "script", "empty", "garbage", "zip", "text"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_and_alien_files(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(hostile(kind))
    with pytest.raises(EditError, match=r"can't be read|could run code") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(zipped=st.booleans(), place=st.floats(0, 1, exclude_max=True), new=st.integers(0, 255), cut=st.floats(0.5, 1))
def test_a_damaged_byte_is_read_or_refused(tmp_path: Path, zipped: bool, place: float, new: int, cut: float) -> None:
    stream = io.BytesIO()
    torch.save({"a.attn2.to_k.weight": torch.ones(3, 3)}, stream, _use_new_zipfile_serialization=zipped)
    content = bytearray(stream.getvalue())
    content[int(place * len(content))] = new
    path = tmp_path / "damaged.pt"
    path.write_bytes(content[: len(content) if cut > 0.9 else int(cut * len(content))])
    # Anything else fails the test.
    with suppress(EditError):
        for weight in read_checkpoint(path).values():
            assert weight.is_floating_point()


def test_a_truncated_safetensors_file(tmp_path: Path, edited: Weights) -> None:
    path = saved(tmp_path / "cut.safetensors", edited)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(EditError, match="damaged or half-written"):
        read_checkpoint(path)
    path.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    with pytest.raises(EditError, match="its header is too large"):
        read_checkpoint(path)


ones = torch.ones(2, 2)
itself: dict[str, Any] = {}
itself["state_dict"] = itself


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([ones], "holds a list, not tensors by name"),
        ({0: ones}, "holds a dict, not tensors by name"),
        (ones, "holds a Tensor, not tensors by name"),
        (itself, "nests state dicts too deeply"),
        ({"unet": {"a.weight": ones}, "text_encoder": {}}, "holds 'text_encoder' beside 'unet'"),
        ({"unet.a.weight": ones, "text_encoder.b.weight": ones}, r"more than unet \('text_encoder\.b\.weight'\)"),
        ({"lora_unet_down_blocks_0.lora_up.weight": ones}, "is a LoRA: give the whole edited weights"),
        ({"a.to_k": ones, "a.to_k.weight": ones}, r"has 'a\.to_k\.weight' twice, as 'a\.to_k' and 'a\.to_k\.weight'"),
        ({"module.a.bias": ones, "a.bias": ones}, r"has 'a\.bias' twice"),
        (
            {"input_blocks.99.1.x.weight": ones},
            r"has 1 names that no such UNet has \('input_blocks\.99\.1\.x\.weight'\)",
        ),
        ({f"{LDM}input_blocks.1.0.x": ones, f"{LDM}y": ones}, r"has 1 names that no such UNet has \('y'\)"),
    ],
)
def test_contents_that_are_no_denoiser(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(EditError, match=message):
        read_checkpoint(saved(tmp_path / "file.pt", content), SD1)


@pytest.mark.parametrize(
    "value",
    [
        7,
        "text",
        {"b": 1},
        torch.ones(2, dtype=torch.int8),
        ones.to(torch.float8_e4m3fn),
        ones.to_sparse(),
        ones.to("meta"),
    ],
)
def test_values_that_are_no_weights(tmp_path: Path, value: Any) -> None:
    """Refused when they are asked for, and others are still read."""
    read = read_checkpoint(saved(tmp_path / "file.pt", {"a.weight": ones, "b.weight": value}))
    assert torch.equal(read["a.weight"], ones)
    with pytest.raises(EditError, match=r"'b\.weight' is .*: give"):
        read["b.weight"]
    assert "b" not in read


def test_paths(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.pt", saved(tmp_path / "weights.npz", {"a.weight": ones})):
        with pytest.raises(EditError, match=r"is not such a file: name one that ends in \.safetensors, \.pt"):
            read_checkpoint(path)
    with pytest.raises(EditError, match=r"the config\.json of such a UNet"):
        read_checkpoint(saved(tmp_path / "a.pt", {"input_blocks.1.1.x": ones}), {"layers_per_block": [1, 2]})
