"""Text embeddings as the denoiser reads them: a folder's own tokenizers and text encoders, all positions.

For each stream of a model family the embeddings equal those that the diffusers pipeline's ``encode_prompt`` returns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from excise.edit.component_files import PLAIN, Float32, Tensors, read_json, weight_files
from excise.edit.families import Family, TextPart, present
from excise.edit.text_model import STEM, TextModel
from excise.editfile import fingerprint
from excise.errors import ModelError

#: Prompts at a time: a large language model's hidden states are many, CLIP's are few.
BATCH, LARGE_BATCH = 64, 8


@dataclass(frozen=True)
class Embedding:
    """What one segment of a stream puts out for one prompt.

    Attributes:
        tokens: float64 with shape (positions, d); one position for a pooled vector.
        length: the positions of the prompt's own tokens, special ones included: ``attention_mask.sum()``. 1 for a
            pooled vector, and for the zeros in place of an encoder that the pipeline lacks.
        start: those of them that come before the prompt's own words, the same in every prompt: 1 where all tokenizers
            of the segment have a start token, else 0.
    """

    tokens: Tensor
    length: int
    start: int


@dataclass(frozen=True)
class _Segment:
    """Encoder and output of each part, joined along the width and padded to ``width``; without any, zeros."""

    sources: tuple[tuple[str, str], ...]
    width: int | None
    positions: int

    def __call__(self, outputs: Mapping[tuple[str, str], Tensor], prompts: int) -> Tensor:
        if not self.sources:
            return next(iter(outputs.values())).new_zeros(prompts, self.positions, self.width or 0)
        joined = torch.cat([outputs[source] for source in self.sources], dim=-1)
        missing = 0 if self.width is None else self.width - joined.shape[-1]
        return torch.nn.functional.pad(joined, (0, missing))


class Encoder:
    """All text encoders that a family's streams read.

    Attributes:
        limit: the tokens that a prompt may have, special ones included, in the encoder that reads the fewest.
    """

    def __init__(
        self,
        models: Mapping[str, TextModel],
        streams: Mapping[str, tuple[_Segment, ...]],
    ) -> None:
        self._models, self._streams = models, streams
        self.limit = min(model.limit for model in models.values())
        self._batch = BATCH if all(model.part.kind == "clip" for model in models.values()) else LARGE_BATCH

    def embed(self, prompts: Sequence[str]) -> Iterator[dict[str, tuple[Embedding, ...]]]:
        """For each prompt in order, the segments of every stream by the stream's name; computed in batches.

        Raises:
            PromptTooLong: a prompt with more tokens than an encoder reads.
        """
        for start in range(0, len(prompts), self._batch):
            yield from self._embed(list(prompts[start : start + self._batch]))

    def _embed(self, batch: list[str]) -> Iterator[dict[str, tuple[Embedding, ...]]]:
        wanted = {source for segments in self._streams.values() for segment in segments for source in segment.sources}
        outputs: dict[tuple[str, str], Tensor] = {}
        lengths: dict[str, list[int]] = {}
        for part, model in self._models.items():
            results, lengths[part] = model(batch, [output for name, output in wanted if name == part])
            outputs.update({(part, output): tensor for output, tensor in results.items()})
        joined = {name: [(s, s(outputs, len(batch))) for s in segments] for name, segments in self._streams.items()}
        for number in range(len(batch)):
            yield {
                name: tuple(self._embedding(segment, tensor[number], lengths, number) for segment, tensor in segments)
                for name, segments in joined.items()
            }

    def _embedding(self, segment: _Segment, tokens: Tensor, lengths: Mapping[str, list[int]], number: int) -> Embedding:
        """One prompt's tokens; a vector is one token, and no encoder an empty prompt."""
        tokens = tokens.cpu()
        if tokens.ndim == 1:
            return Embedding(tokens[None].double(), 1, 0)
        parts = [part for part, _ in segment.sources]
        length = max((lengths[part][number] for part in parts), default=1)
        return Embedding(tokens.double(), length, min((self._models[part].start for part in parts), default=0))


def load_encoder(
    folder: Path,
    family: Family,
    *,
    device: str = "cpu",
    max_sequence_length: int | None = None,
) -> Encoder:
    """The text encoders of a diffusers folder, in float32.

    Args:
        folder: a diffusers folder of ``family``.
        device: where the encoders run; the embeddings lie on the CPU, where they are cached and pile up.
        max_sequence_length: pad to fewer positions than the pipeline does by default, where the encoder allows it.

    Raises:
        ModelError: an encoder or a tokenizer is missing, damaged, quantised or of another class, or a config is.
        UsageError: ``max_sequence_length`` isn't from 1 to the pipeline's.
    """
    config = read_json(folder / family.component / "config.json")
    models = {
        part.component: TextModel(folder, part, max_sequence_length=max_sequence_length, device=device)
        for part in _parts(folder, family)
    }
    positions = {
        part.component: min(max_sequence_length or part.limit, part.limit) for part in family.parts if part.limit
    }
    streams = {}
    for stream in family.streams_of(config):
        width = None if stream.width is None else config.get(stream.width)
        if stream.width is not None and not isinstance(width, int):
            raise ModelError(f"{folder / family.component / 'config.json'} has no {stream.width}: download it again")
        streams[stream.name] = tuple(
            _Segment(tuple(source for source in sources if source[0] in models), width, positions.get(sources[0][0], 0))
            for sources in stream.sources
        )
    return Encoder(models, streams)


def _parts(folder: Path, family: Family) -> list[TextPart]:
    """The text encoders that a pipeline of the family has."""
    index = read_json(folder / "model_index.json")
    return [part for part in family.parts if present(index, part.component) or not part.optional]


def text_fingerprint(folder: Path, family: Family) -> str:
    """SHA-256 over the weights of all encoders that the streams read, without building one.

    With more than one, each weight's name starts with its encoder's.

    Raises:
        ModelError: an encoder is missing, damaged or quantised.
    """
    parts = [folder / part.component for part in _parts(folder, family)]
    tensors = {part.name: Tensors(weight_files(part, STEM)) for part in parts}
    for part, stored in tensors.items():
        for name in stored:
            dtype, _ = stored.header(name)
            # A quantiser's codes would be read as if they were the weights. Earlier versions of transformers stored the
            # positions' numbers too.
            if dtype not in PLAIN and not name.endswith("position_ids"):
                raise ModelError(f"{part}: {name} is quantised (dtype {dtype}): use the original weights")
    return fingerprint(Float32(next(iter(tensors.values())) if len(tensors) == 1 else Tensors.joined(tensors)))


def text_stamp(folder: Path, family: Family) -> tuple[tuple[Path, int, int], ...]:
    """Size and time of change (ns) of every file of the text encoders and their tokenizers: equal while they stay."""
    parts = [folder / name for part in family.parts for name in (part.component, part.tokenizer)]
    files = [path for part in parts if part.is_dir() for path in sorted(part.iterdir())]
    return tuple((path, (status := path.stat()).st_size, status.st_mtime_ns) for path in files)


def text_settings(folder: Path, family: Family) -> str:
    """SHA-256 over the tokenizers' files and the pipeline's class: what decides embeddings besides the weights."""
    index = read_json(folder / "model_index.json")
    digest = hashlib.sha256(str(index.get("_class_name")).encode())
    for part in family.parts:
        tokenizer = folder / part.tokenizer
        for path in sorted(tokenizer.iterdir()) if tokenizer.is_dir() else ():
            if path.is_file():
                digest.update(f"{part.tokenizer}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()
