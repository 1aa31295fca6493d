"""The text encoder of an exported pipeline as a ``TextEmbedder``: a black-box search asks for no gradients."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import CLIPTokenizer

from excise.errors import ArtefactError
from excise.eval.prompt_tokens import Ids, PromptTokens
from excise.eval.text_embedder import Embeddings
from excise.manifest import hash_file
from excise.serve.onnx_component import OnnxComponent, Provider


class OnnxTextEmbedder:
    """A ``TextEmbedder`` in ONNX Runtime; every prompt is computed whole, whatever the bound.

    Args:
        folder: an export, with ``text_encoder/model.onnx`` and ``tokenizer``.
        provider: where it runs.
        threads: CPU threads of one operator; all by default.
        batch_size: prompts computed together.

    Raises:
        ArtefactError: a part is missing or can't be loaded.
        UsageError: a provider that this machine hasn't.
    """

    def __init__(
        self, folder: Path, *, provider: Provider = "cpu", threads: int | None = None, batch_size: int = 64
    ) -> None:
        self._encoder = OnnxComponent(
            folder,
            "text_encoder",
            inputs=["input_ids"],
            output="last_hidden_state",
            provider=provider,
            threads=threads,
        )
        self.batch_size = batch_size
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtefactError(f"{folder} has no CLIP tokenizer that transformers can load: {reason}") from error
        config = self._encoder.config
        context = int(min(tokenizer.model_max_length, config["max_position_embeddings"]))
        self.tokens = PromptTokens(tokenizer, context=context, rows=config["vocab_size"])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ONNX file, which isn't the PyTorch weights' fingerprint."""
        return hash_file(self._encoder.file)

    def embed(self, ids: Ids) -> Embeddings:
        """As in ``TextEmbedder``, of at least one row."""
        starts = range(0, len(ids), self.batch_size)
        rows = [self._encoder(input_ids=ids[start : start + self.batch_size]) for start in starts]
        return np.concatenate(rows)

    def distances(self, ids: Ids, target: Embeddings, *, bound: float = math.inf) -> npt.NDArray[np.float64]:
        """As in ``TextEmbedder``, of at least one row."""
        found: npt.NDArray[np.float64] = np.square(self.embed(ids) - target).sum((1, 2), dtype=np.float64)
        return found
