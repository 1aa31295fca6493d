"""The sites are the layers that read the text: found by watching every layer of a running denoiser."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.edit.families import FAMILIES, family_of
from excise.edit.model_folder import Sites, read_sites
from excise.edit.text import load_encoder
from excise.errors import ModelError, NoCrossAttention, UsageError
from tests.edit import tiny_models as tiny

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tiny_sd(folder_of: Callable[[Callable[[], Any]], Path]) -> Path:
    return folder_of(tiny.stable_diffusion)


@pytest.fixture
def copy(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "copy"))


def denoise(denoiser: Any, streams: dict[str, Tensor]) -> None:
    """One step of a denoiser on random latents, with these embeddings: (1, t, d) by stream, pooled ones too."""
    latents, time = torch.randn(1, denoiser.config.in_channels, 8, 8), torch.tensor([5])
    match type(denoiser).__name__:
        case "UNet2DConditionModel":
            sdxl = denoiser.config.addition_embed_type == "text_time"
            time_ids = (denoiser.config.projection_class_embeddings_input_dim - 20) // 8 if sdxl else 0
            added = {"text_embeds": torch.randn(1, 20), "time_ids": torch.randn(1, time_ids)} if sdxl else None
            condition = denoiser.config.time_cond_proj_dim
            guidance = torch.randn(1, condition) if condition else None
            denoiser(latents, time, streams["text"], timestep_cond=guidance, added_cond_kwargs=added)
        case "SD3Transformer2DModel":
            denoiser(latents, streams["context"], streams["pooled"][:, 0], time)
        case "FluxTransformer2DModel":
            denoiser(
                hidden_states=torch.randn(1, 4, 16),
                encoder_hidden_states=streams["context"],
                pooled_projections=streams["pooled"][:, 0],
                timestep=time,
                guidance=torch.tensor([3.5]),
                img_ids=torch.zeros(4, 3),
                txt_ids=torch.zeros(streams["context"].shape[1], 3),
            )
        case "HiDreamImageTransformer2DModel":
            layers = [streams.get(f"llama.{layer}", torch.randn(1, 128, tiny.LLAMA)) for layer in range(3)]
            denoiser(
                hidden_states=latents,
                timesteps=time,
                encoder_hidden_states_t5=streams["t5"],
                encoder_hidden_states_llama3=torch.stack(layers),
                pooled_embeds=torch.randn(1, 36),
            )
        case "PixArtTransformer2DModel":
            denoiser(latents, streams["text"], time, added_cond_kwargs={"resolution": None, "aspect_ratio": None})
        case other:
            raise AssertionError(other)


@torch.no_grad()
def readers(folder: Path) -> tuple[Sites, dict[str, set[str]]]:
    """The sites, and by stream the weights of the linear layers whose input turned out to be its embedding."""
    sites = read_sites(folder)
    component = folder / sites.family.component
    kind = json.loads((component / "config.json").read_text())["_class_name"]
    denoiser = getattr(diffusers, kind).from_pretrained(component).eval()
    embedded = next(load_encoder(folder, sites.family).embed(["a gun in the style of a cat"]))
    streams = {name: torch.cat([s.tokens for s in segments])[None].float() for name, segments in embedded.items()}
    found: dict[str, set[str]] = {name: set() for name in streams}

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def seen(module: Any, inputs: tuple[Tensor, ...]) -> None:
            for stream, tokens in streams.items():
                if inputs[0].numel() == tokens.numel() and torch.equal(inputs[0].flatten(), tokens.flatten()):
                    found[stream].add(f"{name}.weight")

        return seen

    for name, module in denoiser.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    denoise(denoiser, streams)
    return sites, found


@pytest.mark.parametrize("builder", tiny.FAMILY_OF, ids=lambda builder: builder.__name__)
def test_sites_are_the_layers_that_read_the_text(builder: Callable[[], Any], tmp_path: Path) -> None:
    sites, found = readers(tiny.build(builder, tmp_path / "model"))
    assert sites.family.name == tiny.FAMILY_OF[builder]
    assert {name: set(weights) for name, weights in sites.streams.items()} == found
    assert all(found.values())
    for weights in sites.streams.values():
        assert list(weights) == sorted(weights)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"in_channels": 9}, 8),
        ({"in_channels": 8, "time_cond_proj_dim": 16}, 8),
        ({"layers_per_block": 2, "use_linear_projection": True}, 12),
        # First attentions read the text too, but for the middle block's.
        ({"only_cross_attention": (False, True)}, 14),
        ({"only_cross_attention": (True, False)}, 8),
        ({"only_cross_attention": True}, 14),
        ({"only_cross_attention": (False, True), "mid_block_only_cross_attention": True}, 14),
    ],
    ids=str,
)
def test_every_kind_of_unet(config: dict[str, Any], count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sites, found = readers(tiny.save(tiny.stable_diffusion(**config), tmp_path / "model"))
    assert set(sites.streams["text"]) == found["text"]
    assert len(found["text"]) == count


def test_layers_of_one_llama_layer_are_one_stream(tmp_path: Path) -> None:
    streams = read_sites(tiny.build(tiny.hidream, tmp_path / "model")).streams
    places = {name: [int(weight.split(".")[1]) for weight in weights] for name, weights in streams.items()}
    assert places == {"llama.0": [0], "llama.2": [1, 2], "t5": [3]}


def test_the_registry() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        parts = {part.component for part in family.parts}
        assert len(parts) == len(family.parts)
        read = {encoder for stream in family.streams for sources in stream.sources for encoder, _ in sources}
        assert read == parts, f"{family.name}: every encoder feeds a stream"
        assert family.stream_of("conv_in.weight", {}) is None


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.9.attn2.to_v.weight", "text"),
        ("down_blocks.1.attentions.0.attn2.to_k.weight", "text"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v.weight", None),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0.weight", None),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.bias", None),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k_lora.down.weight", None),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.processor.to_k_ip.0.weight", None),
    ],
)
def test_names(name: str, stream: str | None) -> None:
    family = next(family for family in FAMILIES if family.name == "stable-diffusion")
    assert family.stream_of(name, {}) == stream


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_unknown_pipelines(copy: Path, tmp_path: Path) -> None:
    unet = copy / "unet" / "config.json"
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        family_of(tmp_path)
    changed(unet, encoder_hid_dim_type="ip_image_proj")
    assert family_of(copy).name == "stable-diffusion"
    for projection in ({"encoder_hid_dim_type": "text_proj"}, {"encoder_hid_dim_type": None, "encoder_hid_dim": 64}):
        changed(unet, **projection)
        with pytest.raises(ModelError, match="projects the text by encoder_hid_dim_type 'text_proj'"):
            family_of(copy)
    changed(copy / "model_index.json", text_encoder=[None, None])
    with pytest.raises(ModelError, match=r"must name text_encoder_2 or text_encoder$"):
        family_of(copy)
    changed(unet, _class_name="UNetSpatioTemporalConditionModel")
    with pytest.raises(ModelError, match=r"is a UNetSpatioTemporalConditionModel: .*UNet2DConditionModel.*Flux"):
        family_of(copy)
    unet.write_text("[]")
    with pytest.raises(ModelError, match="a JSON list, not an object"):
        family_of(copy)
    shutil.rmtree(copy / "unet")
    with pytest.raises(ModelError, match="neither unet nor transformer"):
        family_of(copy)


def test_select(tiny_sd: Path) -> None:
    everything = read_sites(tiny_sd).streams["text"]
    values = read_sites(tiny_sd, select=lambda name: name.endswith("to_v.weight")).streams["text"]
    assert set(values) == {name for name in everything if "to_v" in name}
    with pytest.raises(UsageError, match="none of the 8 layers"):
        read_sites(tiny_sd, select=lambda name: False)


def test_a_denoiser_without_sites(copy: Path) -> None:
    save_file({name: t for name, t in load_file(copy / UNET).items() if "attn2" not in name}, copy / UNET)
    with pytest.raises(NoCrossAttention, match=r"UNet2DConditionModel.*attn2\.to_k\.weight"):
        read_sites(copy)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("shard", ["10GB", "60KB"])
def test_variants_and_shards(copy: Path, variant: str, shard: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    expected = read_sites(copy).streams["text"]
    unet = diffusers.UNet2DConditionModel.from_pretrained(copy / "unet").to(dtype)
    (copy / UNET).unlink()
    unet.save_pretrained(copy / "unet", variant=variant, max_shard_size=shard)
    assert (len(list((copy / "unet").glob("*.safetensors"))) > 1) is (shard == "60KB")
    stored = read_sites(copy).streams["text"]
    assert list(stored) == list(expected)
    assert all(torch.equal(stored[name], expected[name].to(dtype)) for name in stored)


def retyped(folder: Path, change: Callable[[Tensor], Tensor], *, only: str = "") -> None:
    """Change the sites whose name contains ``only`` in the file."""
    tensors = load_file(folder / UNET)
    tensors.update({n: change(t).contiguous() for n, t in tensors.items() if "attn2.to_k" in n and only in n})
    save_file(tensors, folder / UNET)


@pytest.mark.parametrize(
    ("change", "only", "message"),
    [
        (lambda t: t.to(torch.int8), "", r"quantised \(dtype I8\)"),
        (lambda t: t.to(torch.uint8), "", r"quantised \(dtype U8\)"),
        (lambda t: t.to(torch.float8_e4m3fn), "", r"quantised \(dtype F8_E4M3\)"),
        (lambda t: t.half(), "", r"is F32, .* is F16: store all in one dtype"),
        (lambda t: t[:, :, None, None], "", r"shape \(32, 32, 1, 1\)"),
        (lambda t: t[:0], "", r"shape \(0, 32\)"),
        (lambda t: t[:, 1:], "mid_block", "of width 31, .* of width 32"),
    ],
)
def test_weights_that_are_refused(copy: Path, change: Callable[[Tensor], Tensor], only: str, message: str) -> None:
    retyped(copy, change, only=only)
    with pytest.raises(ModelError, match=message):
        read_sites(copy)


def test_a_quantised_component(copy: Path) -> None:
    changed(copy / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match="quantization_config"):
        read_sites(copy)


def damaged(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that a reader must not trust, by what is wrong with them."""
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def written(header: Any) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    name = next(name for name in header if name.endswith("attn2.to_k.weight"))
    start, end = header[name]["data_offsets"]
    yield "empty", b""
    yield "no header", whole[:8]
    yield "half-written", whole[: len(whole) // 2]
    yield "one byte short", whole[:-1]
    yield "one byte long", whole + b"\0"
    yield "huge header", struct.pack("<Q", 2**40) + whole[8:]
    yield "negative header", b"\xff" * 8 + whole[8:]
    yield "not JSON", written(b"{")
    yield "a list", written([])
    yield "beyond the end", written({**header, name: {**header[name], "data_offsets": [start, end + 2**40]}})
    yield "overlapping", written({**header, name: {**header[name], "data_offsets": [0, end - start]}})
    yield "another size", written({**header, name: {**header[name], "shape": [2**40, 2**40]}})
    yield "an unknown dtype", written({**header, name: {**header[name], "dtype": "I4096"}})


def test_files_that_cannot_be_trusted(copy: Path) -> None:
    whole = (copy / UNET).read_bytes()
    cases = list(damaged(whole))
    assert len(cases) == 13
    for what, content in cases:
        (copy / UNET).write_bytes(content)
        with pytest.raises(ModelError, match=r"can't be read .*damaged or half-written") as caught:
            read_sites(copy)
        assert "\n" not in str(caught.value), what


@pytest.mark.parametrize("target", ["../../secret.safetensors", "/etc/passwd", "", 3, ".."])
def test_a_shard_index_stays_in_its_folder(copy: Path, target: Any) -> None:
    index = copy / f"{UNET}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": target}}))
    with pytest.raises(ModelError, match=re.escape(index.name)):
        read_sites(copy)
    index.write_text("{}")
    with pytest.raises(ModelError, match="weight_map"):
        read_sites(copy)
