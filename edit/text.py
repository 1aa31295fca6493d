"""Text embeddings as the UNet reads them: a folder's own tokenizer and text encoder, all positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from excise.edit.model_folder import as_float32, read_json, read_tensors, weight_files
from excise.editfile import fingerprint
from excise.errors import ModelError, PromptTooLong

BATCH = 64


@dataclass(frozen=True)
class Embedding:
    """``tokens`` float64 with shape (positions, d); ``length`` is the prompt's own tokens with BOS and EOS."""

    tokens: torch.Tensor
    length: int


class TextEncoder:
    """A CLIP text encoder in float32 on the CPU, with its tokenizer."""

    def __init__(self, folder: Path) -> None:
        for part in ("tokenizer", "text_encoder"):
            if not (folder / part).is_dir():
                raise ModelError(f"{folder / part} is missing: the model folder is incomplete")
        kind = (read_json(folder / "text_encoder" / "config.json").get("architectures") or ["unknown"])[0]
        if kind not in ("CLIPTextModel", "CLIPModel"):
            raise ModelError(f"{folder / 'text_encoder'} is a {kind}: only CLIPTextModel is supported")
        weights = as_float32(read_tensors(weight_files(folder / "text_encoder", "model")))
        self.fingerprint = fingerprint(weights)
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / 'tokenizer'} can't be read: {str(error).splitlines()[0]}") from error
        self._model = CLIPTextModel.from_pretrained(
            folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()

    def embed(self, prompts: Sequence[str]) -> Iterator[Embedding]:
        """Embeddings in order, computed in batches of 64.

        Raises:
            PromptTooLong: a prompt with more tokens than the encoder reads.
        """
        limit = self._tokenizer.model_max_length
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])
            lengths = [len(ids) for ids in self._tokenizer(batch, verbose=False).input_ids]
            for prompt, length in zip(batch, lengths, strict=True):
                if length > limit:
                    raise PromptTooLong(f"{prompt!r} has {length} tokens, this model reads {limit}: shorten it")
            tokens = self._tokenizer(batch, padding="max_length", return_tensors="pt")
            with torch.no_grad():
                states = self._model(input_ids=tokens.input_ids).last_hidden_state.double()
            yield from (Embedding(state, length) for state, length in zip(states, lengths, strict=True))
