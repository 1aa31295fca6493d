"""Token ids to text embeddings, without gradients: all that a black-box search needs of a model.

The published attacks search with the text encoder of the *unedited* model, which everybody has, whatever was edited.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from excise.editfile import fingerprint
from excise.errors import ModelError, UsageError
from excise.eval.causal_text import CausalText, bounded_distances
from excise.eval.prompt_tokens import Ids, PromptTokens

#: float32 with shape (n, t, d) or (t, d).
Embeddings: TypeAlias = npt.NDArray[np.float32]


class TextEmbedder(Protocol):
    """A text encoder with its tokenizer."""

    @property
    def tokens(self) -> PromptTokens:
        """Its tokenizer, and how much it reads."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of its weights: two with equal fingerprints give equal embeddings."""
        ...

    @property
    def batch_size(self) -> int:
        """How many prompts are best given to ``distances`` at a time."""
        ...

    def embed(self, ids: Ids) -> Embeddings:
        """Embeddings with shape (n, t, d) of token ids with shape (n, t)."""
        ...

    def distances(self, ids: Ids, target: Embeddings, *, bound: float = math.inf) -> npt.NDArray[np.float64]:
        """``‖emb(ids) − target‖²`` of each row, with shape (n,); above ``bound``, any value that is above it too.

        ``target`` has shape (t, d).
        """
        ...


class TorchTextEmbedder:
    """A ``TextEmbedder`` in PyTorch.

    Args:
        tokenizer: transformers' CLIP tokenizer.
        text_encoder: a ``CLIPTextModel``, put in evaluation mode.
        batch_size: prompts computed together; by default what is fast on the device.
        stride: positions computed together; see ``causal_text``.

    Raises:
        ModelError: another text encoder.
        UsageError: a size of less than one.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, *, batch_size: int | None = None, stride: int = 8) -> None:
        if not isinstance(text_encoder, torch.nn.Module) or not hasattr(text_encoder, "text_model"):
            name = type(text_encoder).__name__
            raise ModelError(f"the text encoder is a {name}: only CLIP's of Stable Diffusion 1 and 2 can be searched")
        if getattr(text_encoder.config, "use_attention_mask", False):
            raise ModelError("the text encoder masks padding: only Stable Diffusion 1 and 2 can be searched")
        self._model: Any = text_encoder.eval()
        self._causal, self._stride = CausalText(self._model.text_model), stride
        self.batch_size = batch_size if batch_size is not None else 64 if self._causal.device.type == "cpu" else 256
        if min(self.batch_size, stride) < 1:
            raise UsageError(f"batch_size = {self.batch_size}, stride = {stride}: give 1 or more")
        config: Any = text_encoder.config
        context = int(min(tokenizer.model_max_length, config.max_position_embeddings))
        self.tokens = PromptTokens(tokenizer, context=context, rows=config.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights in float32, as an edit file's text encoder fingerprint."""
        return fingerprint({name: one.float().cpu().numpy() for name, one in self._model.state_dict().items()})

    @torch.inference_mode()
    def embed(self, ids: Ids) -> Embeddings:
        """As in ``TextEmbedder``: the model's own forward pass."""
        starts = range(0, len(ids), self.batch_size)
        batches = [torch.from_numpy(ids[start : start + self.batch_size]).to(self._causal.device) for start in starts]
        rows = [self._model(batch)[0].float().cpu().numpy() for batch in batches]
        width = self._model.config.hidden_size
        return np.concatenate([np.zeros((0, ids.shape[1], width), np.float32), *rows])

    def distances(self, ids: Ids, target: Embeddings, *, bound: float = math.inf) -> npt.NDArray[np.float64]:
        """As in ``TextEmbedder``."""
        wanted = torch.from_numpy(np.ascontiguousarray(target, np.float32)).to(self._causal.device)
        rows = [
            bounded_distances(
                self._causal, ids[start : start + self.batch_size], wanted, bound=bound, stride=self._stride
            )
            for start in range(0, len(ids), self.batch_size)
        ]
        return np.concatenate([np.zeros(0), *rows])


def pipeline_embedder(pipeline: Any) -> TorchTextEmbedder:
    """The text encoder of a loaded diffusers pipeline.

    Raises:
        ModelError: it hasn't one CLIP text encoder, as Stable Diffusion 1 and 2 have.
    """
    if getattr(pipeline, "text_encoder_2", None) is not None:
        name = type(pipeline).__name__
        raise ModelError(f"{name} has more than one text encoder: only Stable Diffusion 1 and 2 can be searched")
    return TorchTextEmbedder(pipeline.tokenizer, pipeline.text_encoder)


def folder_embedder(folder: Path, *, device: str = "cpu") -> TorchTextEmbedder:
    """The text encoder of a diffusers folder, in float32, without the rest of the pipeline. Nothing is downloaded.

    Raises:
        ModelError: the folder has none that transformers can load.
    """
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise ModelError(f"{folder} has no {part}: name a diffusers folder")
    if (folder / "text_encoder_2").is_dir():
        raise ModelError(f"{folder} has more than one text encoder: only Stable Diffusion 1 and 2 can be searched")
    try:
        model = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} has no CLIP text encoder that transformers can load: {reason}") from error
    return TorchTextEmbedder(tokenizer, model.requires_grad_(False).to(device))
