"""Tiny random pipelines of every family, built from diffusers' own classes and saved as diffusers folders.

Widths differ wherever the real ones do, so that a layer can only read the text that is meant for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram, WordLevel

WORDS = "a an the of in style painting photo gun sword cat dog sunflower red blue".split()  # noqa: SIM905
CLIP_L, CLIP_G, T5, LLAMA = 32, 24, 64, 40


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """The demo model's: 24 positions."""
    return transformers.CLIPTokenizer.from_pretrained(Path(__file__).parents[2] / "demo" / "model" / "tokenizer")


def clip(
    width: int = CLIP_L, *, projection: int | None = None, positions: int = 24, **config: Any
) -> transformers.CLIPTextModel:
    tokenizer = clip_tokenizer()
    settings = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=positions,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        initializer_factor=10.0,
        **({} if projection is None else {"projection_dim": projection}),
        **config,
    )
    return (
        transformers.CLIPTextModel(settings)
        if projection is None
        else transformers.CLIPTextModelWithProjection(settings)
    )


def t5_tokenizer() -> transformers.T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512)


def t5() -> transformers.T5EncoderModel:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=64, d_model=T5, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )


def llama_tokenizer() -> transformers.PreTrainedTokenizerFast:
    names = ["<s>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def llama() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=LLAMA,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def vae(**config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def unet(width: int, **config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": width,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            **config,
        }
    )


def stable_diffusion(text: dict[str, Any] | None = None, **config: Any) -> diffusers.StableDiffusionPipeline:
    """``config`` is the UNet's, ``text`` the text encoder's."""
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(**(text or {})),
        tokenizer=clip_tokenizer(),
        unet=unet(CLIP_L, **config),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl_unet(width: int, time_ids: int = 6) -> diffusers.UNet2DConditionModel:
    """The base passes six sizes, the refiner four and a score."""
    return unet(
        width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=time_ids * 8 + 20,
    )


def stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(CLIP_G, projection=20),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=_sdxl_unet(CLIP_L + CLIP_G),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
    )


def stable_diffusion_xl_refiner() -> diffusers.StableDiffusionXLImg2ImgPipeline:
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=clip(CLIP_G, projection=20),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(),
        unet=_sdxl_unet(CLIP_G, time_ids=5),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        requires_aesthetics_score=True,
    )


def stable_diffusion_3(*, with_t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.1),
        text_encoder=clip(projection=20),
        text_encoder_2=clip(CLIP_G, projection=16),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=T5,
            caption_projection_dim=32,
            pooled_projection_dim=36,
            pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def stable_diffusion_3_without_t5() -> diffusers.StableDiffusion3Pipeline:
    return stable_diffusion_3(with_t5=False)


def flux() -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(
        vae=vae(shift_factor=0.1),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5,
            pooled_projection_dim=CLIP_L,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def hidream() -> diffusers.HiDreamImagePipeline:
    """Two of the three projections of the language model read its layer 2, the last but one is read by nothing."""
    return diffusers.HiDreamImagePipeline(
        vae=vae(),
        text_encoder=clip(projection=20, positions=128),
        text_encoder_2=clip(CLIP_G, projection=16, positions=128),
        text_encoder_3=t5(),
        text_encoder_4=llama(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        tokenizer_4=llama_tokenizer(),
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[T5, LLAMA],
            text_emb_dim=36,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(8, 8),
            llama_layers=[0, 2, 2],
            force_inference_output=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def pixart(kind: type = diffusers.PixArtAlphaPipeline) -> Any:
    return kind(
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=T5,
            norm_num_groups=2,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
    )


def pixart_sigma() -> Any:
    return pixart(diffusers.PixArtSigmaPipeline)


#: The family of each builder's pipeline.
FAMILY_OF: dict[Callable[[], Any], str] = {
    stable_diffusion: "stable-diffusion",
    stable_diffusion_xl: "stable-diffusion-xl",
    stable_diffusion_xl_refiner: "stable-diffusion-xl",
    stable_diffusion_3: "stable-diffusion-3",
    stable_diffusion_3_without_t5: "stable-diffusion-3",
    flux: "flux",
    hidream: "hidream",
    pixart: "pixart",
    pixart_sigma: "pixart",
}


def save(pipeline: Any, folder: Path) -> Path:
    """Save a pipeline as a diffusers folder."""
    pipeline.save_pretrained(folder)
    return folder


def build(builder: Callable[[], Any], folder: Path) -> Path:
    """Build with random weights that are the same every time, and save."""
    torch.manual_seed(0)
    return save(builder(), folder)
