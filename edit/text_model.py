"""One text encoder of a pipeline with its tokenizer, run as the pipeline runs it: padding, mask, hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from excise.edit.component_files import read_json, stored_variant, weight_files
from excise.edit.families import TextPart
from excise.errors import ModelError, PromptTooLong, UsageError
from excise.printable import short

STEM = "model"


@dataclass(frozen=True)
class Kind:
    """Where transformers has a kind's classes. They are imported by name when used: each import costs seconds."""

    models: str
    classes: tuple[str, ...]
    tokenizers: str
    tokenizer: str


KINDS = {
    "clip": Kind(
        "transformers.models.clip.modeling_clip",
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        "transformers.models.clip.tokenization_clip",
        "CLIPTokenizer",
    ),
    "t5": Kind(
        "transformers.models.t5.modeling_t5",
        ("T5EncoderModel",),
        "transformers.models.t5.tokenization_t5_fast",
        "T5TokenizerFast",
    ),
    "llama": Kind(
        "transformers.models.llama.modeling_llama",
        ("LlamaForCausalLM",),
        "transformers.tokenization_utils_fast",
        "PreTrainedTokenizerFast",
    ),
}


class TextModel:
    """A text encoder in float32, frozen.

    Attributes:
        limit: positions that a prompt is padded to.
        start: tokens that the tokenizer puts before every prompt's own: 1 for CLIP, 0 for T5.

    Args:
        folder: the diffusers folder.
        part: which of its encoders.
        max_sequence_length: pad to fewer positions than the pipeline; CLIP's are fixed.
        device: where it runs.

    Raises:
        ModelError: it or its tokenizer is missing, incomplete, damaged, quantised or of another class.
        UsageError: ``max_sequence_length`` isn't from 1 to the pipeline's.
    """

    def __init__(self, folder: Path, part: TextPart, *, max_sequence_length: int | None, device: str) -> None:
        self.part, self._folder, self._device = part, folder / part.component, device
        for path in (folder / part.tokenizer, self._folder):
            if not path.is_dir():
                raise ModelError(f"{path} is missing: the model folder is incomplete")
        index, kind = read_json(folder / "model_index.json"), KINDS[part.kind]
        name = index[part.component][1]
        if name not in kind.classes:
            raise ModelError(f"{self._folder} is a {name}: only {' and '.join(kind.classes)} are supported")
        config = read_json(self._folder / "config.json")
        if config.get("quantization_config"):
            raise ModelError(f"{self._folder} is quantised (its config says so): use the original weights")
        self._masked = bool(config.get("use_attention_mask")) if part.masked is None else part.masked
        self._tokenizer = _tokenizer(folder / part.tokenizer, kind)
        if part.kind == "llama":
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.limit = self._limit(index.get("_class_name"), config, max_sequence_length)
        # Tokens that come from the text aren't special here, known or not.
        self.start = int(self._tokenizer("a", return_special_tokens_mask=True).special_tokens_mask[0])
        weight_files(self._folder, STEM)  # names what is missing
        self._model = _model(self._folder, getattr(import_module(kind.models), name)).eval().to(device)
        if part.kind == "llama":
            # The hidden states don't need the vocabulary's logits.
            self._model = self._model.get_decoder()

    def _limit(self, pipeline: object, config: dict[str, Any], lowered: int | None) -> int:
        if self.part.limit is None:
            return min(int(self._tokenizer.model_max_length), int(config.get("max_position_embeddings", 77)))
        limit = next((n for name, n in self.part.longer if name == pipeline), self.part.limit)
        if lowered is not None and not 1 <= lowered <= limit:
            raise UsageError(f"max_sequence_length = {lowered}: give 1 to {limit}, the pipeline's")
        return limit if lowered is None else lowered

    def __call__(self, prompts: Sequence[str], outputs: Iterable[str]) -> tuple[dict[str, Tensor], list[int]]:
        """The outputs asked for, by name, and each prompt's tokens without padding, special ones included.

        Args:
            prompts: n of them.
            outputs: "last", "penultimate", or a layer's number: shape (n, limit, d). "pooled", "projected": (n, d).

        Raises:
            PromptTooLong: a prompt with more tokens than the pipeline reads; it would cut them off.
        """
        texts = [prompt.lower().strip() for prompt in prompts] if self.part.lowered else list(prompts)
        lengths = [len(ids) for ids in self._tokenizer(texts, verbose=False).input_ids]
        for prompt, length in zip(prompts, lengths, strict=True):
            if length > self.limit:
                raise PromptTooLong(f"{short(prompt)} has {length} tokens, this model reads {self.limit}: shorten it")
        tokens = self._tokenizer(texts, padding="max_length", max_length=self.limit, return_tensors="pt")
        names = set(outputs)
        with torch.no_grad():
            result = self._model(
                input_ids=tokens.input_ids.to(self._device),
                attention_mask=tokens.attention_mask.to(self._device) if self._masked else None,
                output_hidden_states=not names <= {"last", "pooled", "projected"},
            )
        return {name: _output(result, name) for name in names}, lengths


def _output(result: Any, name: str) -> Tensor:
    """One output of a transformers model; ``hidden_states`` starts with the input of layer 0."""
    named = {"last": "last_hidden_state", "pooled": "pooler_output", "projected": "text_embeds"}
    place = -2 if name == "penultimate" else None if name in named else int(name) + 1
    tensor: Tensor = getattr(result, named[name]) if place is None else result.hidden_states[place]
    return tensor


def _tokenizer(folder: Path, kind: Kind) -> Any:
    if kind.tokenizer != "CLIPTokenizer" and not (folder / "tokenizer.json").exists():
        raise ModelError(f"{folder / 'tokenizer.json'} is missing: save the tokenizer as {kind.tokenizer} first")
    try:
        return getattr(import_module(kind.tokenizers), kind.tokenizer).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{folder} can't be read: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _model(folder: Path, kind: Any) -> Any:
    """The model with all of its weights: transformers would draw missing ones at random and go on."""
    try:
        model, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=stored_variant(folder, STEM),
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder} can't be read: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if found[problem]:
            raise ModelError(
                f"{folder} doesn't fit its config ({problem}: {sorted(found[problem])[0]}): download it again"
            )
    return model
