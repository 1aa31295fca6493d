"""Embeddings are what diffusers' own pipelines pass to their denoisers, for every family."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.edit import text_model
from excise.edit.families import family_of
from excise.edit.text import BATCH, Encoder, load_encoder, text_fingerprint, text_settings
from excise.editfile import fingerprint
from excise.errors import ModelError, PromptTooLong, UsageError
from tests.edit import tiny_models as tiny

PROMPTS = ["a gun", "", " Red cat in the style of a painting "]

Folders = Callable[[Callable[[], Any]], Path]


@pytest.fixture
def copy_of(folder_of: Folders, tmp_path: Path) -> Folders:
    """A copy to damage."""
    return lambda builder: Path(shutil.copytree(folder_of(builder), tmp_path / "copy"))


def encoder_of(folder: Path, **options: Any) -> Encoder:
    return load_encoder(folder, family_of(folder), **options)


def fingerprint_of(folder: Path) -> str:
    return text_fingerprint(folder, family_of(folder))


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """By stream, what the pipeline passes to its denoiser for ``prompts``, by its ``encode_prompt``."""
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    match type(pipeline).__name__:
        case "StableDiffusionPipeline" | "StableDiffusionXLPipeline" | "StableDiffusionXLImg2ImgPipeline":
            return {"text": pipeline.encode_prompt(prompts, **options)[0]}
        case "StableDiffusion3Pipeline":
            context, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, **options)
            return {"context": context, "pooled": pooled[:, None]}
        case "FluxPipeline":
            context, pooled, _ = pipeline.encode_prompt(prompts, None, device="cpu")
            return {"context": context, "pooled": pooled[:, None]}
        case "HiDreamImagePipeline":
            states, _, layers, *_ = pipeline.encode_prompt(prompts, **options)
            read = set(pipeline.transformer.config.llama_layers)
            return {"t5": states, **{f"llama.{layer}": layers[layer] for layer in read}}
        case _:
            return {"text": pipeline.encode_prompt(prompts, **options)[0]}


@torch.no_grad()
# HiDream's pipeline asks for attentions that it doesn't use.
@pytest.mark.filterwarnings("ignore:`output_attentions=True` is not supported:UserWarning")
@pytest.mark.parametrize("builder", tiny.FAMILY_OF, ids=lambda builder: builder.__name__)
def test_embeddings_are_the_pipelines(folder_of: Folders, builder: Callable[[], Any]) -> None:
    folder = folder_of(builder)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if builder is tiny.stable_diffusion_3_without_t5 else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    expected = encoded(pipeline, PROMPTS)
    embedded = list(encoder_of(folder).embed(PROMPTS))
    assert len(embedded) == len(PROMPTS)
    for number, streams in enumerate(embedded):
        assert streams.keys() == expected.keys()
        for name, segments in streams.items():
            joined = torch.cat([segment.tokens for segment in segments])
            assert joined.dtype == torch.float64
            # Measured: equal bit for bit.
            torch.testing.assert_close(joined, expected[name][number].double(), rtol=0, atol=1e-6)
    for name, rows in expected.items():
        assert (rows[0] - rows[2]).abs().max() > 1e-2, f"{name} doesn't tell the prompts apart"
        assert (rows[0] - rows[1]).abs().max() > 1e-2


@torch.no_grad()
def test_an_attention_mask_where_the_config_asks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = tiny.stable_diffusion(text={"use_attention_mask": True})
    folder = tiny.save(pipeline, tmp_path / "masked")
    expected = encoded(pipeline, ["a gun"])["text"][0].double()
    masked = next(encoder_of(folder).embed(["a gun"]))["text"][0].tokens
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-6)
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"use_attention_mask": true', '"use_attention_mask": false'))
    plain = next(encoder_of(folder).embed(["a gun"]))["text"][0].tokens
    assert (plain - masked).abs().max() > 1e-2


def test_lengths_are_the_attention_masks(folder_of: Folders) -> None:
    clip, t5, llama = tiny.clip_tokenizer(), tiny.t5_tokenizer(), tiny.llama_tokenizer()
    prompts = ["a gun", "", "a red cat"]
    for builder, name, tokenizers in [
        (tiny.stable_diffusion, "text", [clip]),
        (tiny.stable_diffusion_xl, "text", [clip]),
        (tiny.stable_diffusion_3, "context", [clip, t5]),
        (tiny.flux, "context", [t5]),
        (tiny.hidream, "llama.2", [llama]),
        (tiny.pixart, "text", [t5]),
    ]:
        for prompt, streams in zip(prompts, encoder_of(folder_of(builder)).embed(prompts), strict=True):
            expected = [len(tokenizer(prompt).input_ids) for tokenizer in tokenizers]
            assert [segment.length for segment in streams[name]] == expected
    streams = next(encoder_of(folder_of(tiny.stable_diffusion_3_without_t5)).embed([""]))
    assert [segment.length for segment in streams["context"]] == [2, 1]
    assert [segment.length for segment in streams["pooled"]] == [1]
    assert not streams["context"][1].tokens.any()


def test_what_comes_before_a_prompts_words_is_what_the_tokenizer_puts_there(
    folder_of: Folders, copy_of: Folders
) -> None:
    """The row that is the same in every prompt, where there is one; masked and causal, it doesn't see the words."""
    for builder, name, starts in [
        (tiny.stable_diffusion, "text", [1]),
        (tiny.stable_diffusion_xl, "text", [1]),
        (tiny.stable_diffusion_3, "context", [1, 0]),
        (tiny.stable_diffusion_3_without_t5, "context", [1, 0]),
        (tiny.stable_diffusion_3, "pooled", [0]),
        (tiny.flux, "context", [0]),
        (tiny.hidream, "llama.2", [1]),
        (tiny.hidream, "t5", [0]),
        (tiny.pixart, "text", [0]),
    ]:
        one, other = encoder_of(folder_of(builder)).embed(["gun", "zebra"])
        assert [segment.start for segment in one[name]] == [segment.start for segment in other[name]] == starts
        for first, second in zip(one[name], other[name], strict=True):
            if first.tokens.any():
                # Measured: 0, and 2.1 at least.
                assert float((first.tokens[0] - second.tokens[0]).abs().max() < 1e-5) == first.start
    copy = copy_of(tiny.hidream)
    path = copy / "tokenizer_4" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps({**tokenizer, "post_processor": None}))
    assert next(encoder_of(copy).embed(["gun"]))["llama.2"][0].start == 0


def test_batches_are_seamless(folder_of: Folders) -> None:
    prompts = [f"a {word} cat" for word in tiny.WORDS] * (BATCH // len(tiny.WORDS) + 1)
    prompts = prompts[: BATCH + 2]
    assert len(prompts) > BATCH
    for builder in (tiny.stable_diffusion, tiny.pixart):
        encoder = encoder_of(folder_of(builder))
        embedded = list(encoder.embed(prompts))
        assert len(embedded) == len(prompts)
        for number in (0, 9, BATCH, len(prompts) - 1):
            alone = next(encoder.embed([prompts[number]]))
            for name, segments in embedded[number].items():
                torch.testing.assert_close(segments[0].tokens, alone[name][0].tokens, rtol=0, atol=1e-5)
        assert list(encoder.embed([])) == []


def test_limits(folder_of: Folders) -> None:
    long = "cat " * 23
    for builder, limit in [
        (tiny.stable_diffusion, 24),
        (tiny.pixart, 120),
        (tiny.pixart_sigma, 300),
        (tiny.hidream, 128),
    ]:
        assert encoder_of(folder_of(builder)).limit == limit
    with pytest.raises(PromptTooLong, match="has 25 tokens, this model reads 24"):
        next(encoder_of(folder_of(tiny.flux)).embed([long]))
    sigma = folder_of(tiny.pixart_sigma)
    assert next(encoder_of(sigma).embed([long]))["text"][0].tokens.shape == (300, tiny.T5)
    lowered = encoder_of(sigma, max_sequence_length=20)
    with pytest.raises(PromptTooLong, match="has 24 tokens, this model reads 20"):
        next(lowered.embed([long]))
    # Masked, so that the tokens don't depend on the padding.
    short, full = (next(encoder.embed(["a gun"]))["text"][0] for encoder in (lowered, encoder_of(sigma)))
    torch.testing.assert_close(short.tokens[: short.length], full.tokens[: full.length], rtol=0, atol=1e-6)
    for wrong in (0, -1, 301):
        with pytest.raises(UsageError, match=f"max_sequence_length = {wrong}: give 1 to 300"):
            encoder_of(sigma, max_sequence_length=wrong)
    empty = encoder_of(folder_of(tiny.stable_diffusion_3_without_t5), max_sequence_length=5)
    assert next(empty.embed([""]))["context"][1].tokens.shape == (5, tiny.T5)


def test_a_config_without_the_width(copy_of: Folders) -> None:
    config = (copy := copy_of(tiny.stable_diffusion_3_without_t5)) / "transformer" / "config.json"
    config.write_text(config.read_text().replace("joint_attention_dim", "another"))
    with pytest.raises(ModelError, match="has no joint_attention_dim"):
        encoder_of(copy)


def test_the_fingerprint_is_over_every_encoder(folder_of: Folders, copy_of: Folders) -> None:
    single = folder_of(tiny.stable_diffusion)
    stored = {name: t.numpy() for name, t in load_file(single / "text_encoder" / "model.safetensors").items()}
    assert fingerprint_of(single) == fingerprint(stored)
    copy = copy_of(tiny.stable_diffusion_3)
    before = fingerprint_of(copy)
    assert before == fingerprint_of(folder_of(tiny.stable_diffusion_3))
    assert before != fingerprint_of(folder_of(tiny.stable_diffusion_3_without_t5))
    for component in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        file = copy / component / "model.safetensors"
        original = file.read_bytes()
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})
        assert fingerprint_of(copy) != before
        file.write_bytes(original)


def test_another_tokenizer_is_another_setting(folder_of: Folders, copy_of: Folders) -> None:
    """Cached embeddings of one aren't the other's, though the text encoder is the same."""
    copy = copy_of(tiny.stable_diffusion)
    before = text_settings(copy, family_of(copy))
    assert before == text_settings(folder_of(tiny.stable_diffusion), family_of(copy))
    vocabulary = copy / "tokenizer" / "vocab.json"
    vocabulary.write_text(vocabulary.read_text().replace("gun", "nug"))
    assert text_settings(copy, family_of(copy)) != before
    assert fingerprint_of(copy) == fingerprint_of(folder_of(tiny.stable_diffusion))


def test_other_ways_of_storing(folder_of: Folders, copy_of: Folders) -> None:
    from transformers import T5EncoderModel

    expected = next(encoder_of(folder_of(tiny.pixart)).embed(["a gun"]))["text"][0].tokens
    copy = copy_of(tiny.pixart)
    part = copy / "text_encoder"
    (part / "model.safetensors").unlink()
    model = T5EncoderModel.from_pretrained(folder_of(tiny.pixart) / "text_encoder")
    model.save_pretrained(part, max_shard_size="20KB")
    assert len(list(part.glob("model-*.safetensors"))) > 2
    sharded = encoder_of(copy)
    assert torch.equal(next(sharded.embed(["a gun"]))["text"][0].tokens, expected)
    assert fingerprint_of(copy) == fingerprint_of(folder_of(tiny.pixart))
    for file in part.glob("model*"):
        file.unlink()
    model.half().save_pretrained(part, variant="fp16")
    half = next(encoder_of(copy).embed(["a gun"]))["text"][0].tokens
    torch.testing.assert_close(half, expected, rtol=0, atol=5e-3)
    assert not torch.equal(half, expected)


def test_clip_alone_imports_no_language_model(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []

    def recorded(name: str) -> Any:
        imported.append(name)
        return importlib.import_module(name)

    monkeypatch.setattr(text_model, "import_module", recorded)
    encoder_of(folder_of(tiny.stable_diffusion_xl))
    assert imported
    assert all(name.startswith("transformers.models.clip.") for name in imported)
    encoder_of(folder_of(tiny.flux))
    assert any(name.startswith("transformers.models.t5.") for name in imported)


def _without_a_weight(folder: Path) -> None:
    file = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors, file, {"format": "pt"})


def _halved(folder: Path) -> None:
    file = folder / "text_encoder_2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def _quantised(folder: Path) -> None:
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"load_in_8bit": True}}))


def _wider(folder: Path) -> None:
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "d_ff": 7}))


def _of_another_class(folder: Path) -> None:
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "text_encoder_2": ["transformers", "UMT5EncoderModel"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "tokenizer_2 is missing"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder is missing"),
        (lambda folder: (folder / "tokenizer_2" / "tokenizer.json").unlink(), r"save the tokenizer as T5TokenizerFast"),
        (lambda folder: (folder / "tokenizer_2" / "tokenizer.json").write_text("{"), r"tokenizer_2 can't be read"),
        (lambda folder: (folder / "text_encoder_2" / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda folder: (folder / "text_encoder_2" / "config.json").unlink(), r"config\.json is missing"),
        (_without_a_weight, r"missing_keys: encoder\.block\.0"),
        (_halved, "text_encoder_2 can't be read"),
        (_quantised, "quantised"),
        (_wider, "text_encoder_2 "),
        (_of_another_class, "is a UMT5EncoderModel: only T5EncoderModel"),
    ],
)
def test_folders_that_are_refused(copy_of: Folders, damage: Callable[[Path], object], message: str) -> None:
    copy = copy_of(tiny.flux)
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        encoder_of(copy)
    assert "\n" not in str(caught.value)
