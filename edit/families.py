"""Model families: which linear layers of a denoiser read the text, and which output of which text encoder they read.

A layer reads a text embedding ``c`` as ``W c + b``. An edit multiplies ``W`` from the right and leaves ``b`` alone, so
``W T c + b = W c* + b`` where ``T c = c*``. (The published UCE aims at ``W c* + b`` with a ``W`` that is applied
without ``b``, and so counts the bias twice: arXiv 2308.14761, rohitgandikota/unified-concept-editing.)

Layers that read the same embedding are a *stream* and share ``T``. What feeds each layer is what diffusers' pipelines
pass to it; the layers of Stable Diffusion, Flux and HiDream are those that the published UCE edits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from excise.edit.component_files import read_json
from excise.errors import ModelError

Config = Mapping[str, Any]
Sites = Callable[[str, Config], str | None]


@dataclass(frozen=True)
class TextPart:
    """One text encoder of a pipeline, with its tokenizer.

    Attributes:
        component: its folder; the tokenizer's has the same ending ("text_encoder_2", "tokenizer_2").
        kind: what tokenizes and embeds.
        limit: positions that the pipeline pads to; None for CLIP, whose tokenizer says it.
        longer: pipelines that pad to another length.
        masked: whether the pipeline passes the attention mask; None where the encoder's config decides.
        lowered: whether the pipeline lowers and strips the prompt first.
        optional: whether a pipeline may lack it.
    """

    component: str
    kind: Literal["clip", "t5", "llama"]
    limit: int | None = None
    longer: tuple[tuple[str, int], ...] = ()
    masked: bool | None = False
    lowered: bool = False
    optional: bool = False

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer."""
        return self.component.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Stream:
    """The text embeddings that one group of layers reads.

    Attributes:
        name: "text" (all that the denoiser knows of the prompt), "context" (its tokens) beside "pooled" (one vector for
            the whole prompt), "llama.<k>" (what layer k of the language model puts out), "t5".
        segments: in order of position, each ``encoder.output``, or several joined by " + " along the width. Outputs
            are "last" (after the final norm), "penultimate" (the last layer's input), "pooled", "projected" (pooled,
            through the projection), and a layer's number.
        width: key of the denoiser's config with the width to which every segment is padded by zeros.
    """

    name: str
    segments: tuple[str, ...]
    width: str | None = None

    @property
    def sources(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """The encoder and the output of each part of each segment."""
        split = (segment.split(" + ") for segment in self.segments)
        return tuple(tuple((s.partition(".")[0], s.partition(".")[2]) for s in parts) for parts in split)


@dataclass(frozen=True)
class Family:
    """One kind of pipeline.

    Attributes:
        name: as the edit file has it.
        component: folder of the denoiser.
        denoisers: class names of the denoiser.
        parts: the text encoders that the streams read; the encoder of any other is never opened.
        streams: every stream; "*" stands for each of the denoiser's ``llama_layers``.
        sites: the stream that a weight reads.
        sought: the names of its sites, for a message.
    """

    name: str
    component: Literal["unet", "transformer"]
    denoisers: tuple[str, ...]
    parts: tuple[TextPart, ...]
    streams: tuple[Stream, ...]
    sites: Sites
    sought: str

    def stream_of(self, weight_name: str, config: Config) -> str | None:
        """Name of the stream that the linear weight ``weight_name`` of the denoiser reads; None: it reads no text."""
        return self.sites(weight_name, config)

    def streams_of(self, config: Config) -> tuple[Stream, ...]:
        """The streams of a denoiser with this config, each layer of the language model by its number."""
        layers = [str(layer) for layer in dict.fromkeys(config.get("llama_layers") or ())]
        return tuple(
            Stream(stream.name.replace("*", layer), tuple(s.replace("*", layer) for s in stream.segments), stream.width)
            for stream in self.streams
            for layer in (layers if "*" in stream.name else [""])
        )


_ATTENTION = re.compile(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\..*\.attn([12])\.to_[kv]\.weight")


def _cross_attention(name: str, config: Config) -> str | None:
    """K and V of a UNet's attention layers that read the text.

    A transformer block's second attention always does; its first one too where the block has ``only_cross_attention``
    (the × 4 upscaler), which is one flag for each down block, and never applies to the middle.
    """
    match = _ATTENTION.fullmatch(name)
    if match is None:
        return None
    if match[2] == "2":
        return "text"
    only, (kind, _, place) = config.get("only_cross_attention") or False, match[1].partition(".")
    flags = [only] * (int(place or 0) + 1) if isinstance(only, bool) else list(only)
    if kind == "up_blocks":
        flags.reverse()
    return "text" if place and int(place) < len(flags) and flags[int(place)] else None


def _embedders(name: str, config: Config) -> str | None:
    """The projections of the tokens and of the pooled vector, for all blocks at once."""
    sites = {"context_embedder.weight": "context", "time_text_embed.text_embedder.linear_1.weight": "pooled"}
    return sites.get(name)


def _caption(name: str, config: Config) -> str | None:
    """The projection of the tokens, for all blocks at once."""
    return "text" if name == "caption_projection.linear_1.weight" else None


def _hidream(name: str, config: Config) -> str | None:
    """``caption_projection.N.linear`` reads layer ``llama_layers[N]``; the one after all blocks' reads T5."""
    match = re.fullmatch(r"caption_projection\.(\d+)\.linear\.weight", name)
    if match is None:
        return None
    layers, place = config.get("llama_layers") or (), int(match[1])
    if place == config.get("num_layers", 16) + config.get("num_single_layers", 32):
        return "t5"
    return f"llama.{layers[place]}" if place < len(layers) else None


#: A pipeline is of the first family that has its denoiser's class and text encoders: SDXL stands before its elder.
FAMILIES: tuple[Family, ...] = (
    Family(
        name="stable-diffusion-xl",
        component="unet",
        denoisers=("UNet2DConditionModel",),
        parts=(TextPart("text_encoder", "clip", optional=True), TextPart("text_encoder_2", "clip")),
        streams=(Stream("text", ("text_encoder.penultimate + text_encoder_2.penultimate",)),),
        sites=_cross_attention,
        sought="…attn2.to_k.weight or …attn2.to_v.weight",
    ),
    Family(
        name="stable-diffusion",
        component="unet",
        denoisers=("UNet2DConditionModel",),
        parts=(TextPart("text_encoder", "clip", masked=None),),
        streams=(Stream("text", ("text_encoder.last",)),),
        sites=_cross_attention,
        sought="…attn2.to_k.weight or …attn2.to_v.weight",
    ),
    Family(
        name="stable-diffusion-3",
        component="transformer",
        denoisers=("SD3Transformer2DModel",),
        parts=(
            TextPart("text_encoder", "clip"),
            TextPart("text_encoder_2", "clip"),
            TextPart("text_encoder_3", "t5", limit=256, optional=True),
        ),
        streams=(
            Stream(
                "context",
                ("text_encoder.penultimate + text_encoder_2.penultimate", "text_encoder_3.last"),
                width="joint_attention_dim",
            ),
            Stream("pooled", ("text_encoder.projected + text_encoder_2.projected",)),
        ),
        sites=_embedders,
        sought="context_embedder.weight",
    ),
    Family(
        name="flux",
        component="transformer",
        denoisers=("FluxTransformer2DModel",),
        parts=(TextPart("text_encoder", "clip"), TextPart("text_encoder_2", "t5", limit=512)),
        streams=(Stream("context", ("text_encoder_2.last",)), Stream("pooled", ("text_encoder.pooled",))),
        sites=_embedders,
        sought="context_embedder.weight",
    ),
    Family(
        name="hidream",
        component="transformer",
        denoisers=("HiDreamImageTransformer2DModel",),
        parts=(
            TextPart("text_encoder_3", "t5", limit=128, masked=True),
            TextPart("text_encoder_4", "llama", limit=128, masked=True),
        ),
        streams=(Stream("llama.*", ("text_encoder_4.*",)), Stream("t5", ("text_encoder_3.last",))),
        sites=_hidream,
        sought="caption_projection.0.linear.weight",
    ),
    Family(
        name="pixart",
        component="transformer",
        # Its first checkpoints name the class that DiT has too; DiT has no caption_projection, and so no site.
        denoisers=("PixArtTransformer2DModel", "Transformer2DModel"),
        parts=(
            TextPart(
                "text_encoder", "t5", limit=120, longer=(("PixArtSigmaPipeline", 300),), masked=True, lowered=True
            ),
        ),
        streams=(Stream("text", ("text_encoder.last",)),),
        sites=_caption,
        sought="caption_projection.linear_1.weight",
    ),
)


def present(index: Config, component: str) -> bool:
    """Whether a pipeline's ``model_index.json`` has a component; one that is left out is ``[null, null]``."""
    entry = index.get(component)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def family_of(folder: Path) -> Family:
    """The family of the pipeline in a diffusers folder, from its configs alone.

    Raises:
        ModelError: no ``model_index.json``, no denoiser, one that isn't supported, or none of its text encoders.
    """
    index = read_json(folder / "model_index.json")
    known = ", ".join(dict.fromkeys(kind for family in FAMILIES for kind in family.denoisers))
    component = next((c for c in ("unet", "transformer") if (folder / c).is_dir()), None)
    if component is None:
        raise ModelError(f"{folder} has neither unet nor transformer: name a pipeline with one of {known}")
    config = read_json(folder / component / "config.json")
    kind = config.get("_class_name")
    families = [family for family in FAMILIES if family.component == component and kind in family.denoisers]
    if not families:
        raise ModelError(f"{folder / component} is a {kind}: name a pipeline with one of {known}")
    for family in families:
        if all(part.optional or present(index, part.component) for part in family.parts):
            _check_projection(folder / component, config)
            return family
    wanted = " or ".join(
        " and ".join(part.component for part in family.parts if not part.optional) for family in families
    )
    raise ModelError(
        f"{folder} has no text encoder that a {kind} is known to read: model_index.json must name {wanted}"
    )


def _check_projection(component: Path, config: Config) -> None:
    """Refuse a UNet that projects the text first: its K and V don't read what the text encoder puts out."""
    kind = config.get("encoder_hid_dim_type") or ("text_proj" if config.get("encoder_hid_dim") else None)
    # An image-prompt adapter passes the text on as it is.
    if kind not in (None, "ip_image_proj"):
        raise ModelError(
            f"{component} projects the text by encoder_hid_dim_type {kind!r}: such models aren't supported"
        )
