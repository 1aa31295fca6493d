"""From prompts to an edit file's content: read the folder, embed the prompts, solve, and describe what was done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import excise
from excise.edit.fitter import Scales
from excise.edit.model_folder import as_float32, cross_attention_weights
from excise.edit.rece import EPOCH_SCALES, rece
from excise.edit.text import Embedding, TextEncoder
from excise.edit.tokens import RULES, Concept
from excise.edit.transform import Transform
from excise.editfile import Edit, fingerprint
from excise.editmetadata import EditMetadata, Erased, Kept, Stream
from excise.errors import UsageError

METHODS = ("rece", "uce")


@dataclass(frozen=True)
class Options:
    """Everything that decides an edit besides the model.

    ``ridge`` is λ of RECE's eq. 8; ``erase_scale``, ``keep_scale``, ``regularization`` are s, λ₁, λ₂ of the UCE stage.
    """

    erase: tuple[str, ...]
    to: tuple[str, ...]
    keep: tuple[str, ...] = ()
    method: str = "rece"
    preset: str | None = None
    epochs: int = 1
    ridge: float = 0.1
    erase_scale: float = 1.0
    keep_scale: float = 1.0
    regularization: float = 0.5
    technique: Literal["replace", "tensor"] = "replace"
    anchor: Literal["current", "original"] = "current"
    rule: str = "last-subject"

    @property
    def targets(self) -> tuple[str, ...]:
        """One target for each concept."""
        return self.to * len(self.erase) if len(self.to) == 1 else self.to

    def check(self) -> None:
        """Raise ``UsageError`` for the first option that can't be used."""
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.rule not in RULES:
            raise UsageError(f"unknown token rule {self.rule!r}: choose one of {', '.join(RULES)}")
        if not self.erase:
            raise UsageError("nothing to erase: give --erase TEXT, or a preset that names its concepts")
        for concept in self.erase:
            if not concept.strip():
                raise UsageError(f"the concept {concept!r} is empty: --erase takes the words that name it")
        if len(self.to) not in (1, len(self.erase)):
            raise UsageError(
                f"{len(self.to)} targets for {len(self.erase)} concepts: give --to once, or once for each --erase"
            )
        if self.epochs < 0:
            raise UsageError(f"--epochs {self.epochs} is negative: 0 is UCE alone")
        for name in ("ridge", "erase_scale", "regularization"):
            value = getattr(self, name)
            if not value > 0 or not np.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} {value} must be a positive number")
        if self.keep_scale < 0 or not np.isfinite(self.keep_scale):
            raise UsageError(f"--keep-scale {self.keep_scale} must be zero or a positive number")


def _concepts(encoder: TextEncoder, options: Options) -> list[Concept]:
    """Embeddings of each concept and its target; an empty target means ``" "``, as published."""
    targets = options.targets
    prompts = list(dict.fromkeys([*options.erase, *(target or " " for target in targets)]))
    embedded: dict[str, Embedding] = dict(zip(prompts, encoder.embed(prompts), strict=True))
    return [
        Concept(
            tokens=embedded[concept].tokens,
            target=embedded[target or " "].tokens,
            tokens_length=embedded[concept].length,
            target_length=embedded[target or " "].length,
        )
        for concept, target in zip(options.erase, targets, strict=True)
    ]


def erase(folder: Path, options: Options, *, progress: Callable[[str], None] = lambda message: None) -> Edit:
    """Erase concepts from a diffusers folder; only the text encoder and the K and V tensors are read.

    Raises:
        UsageError: an option that can't be used, a prompt over the token limit.
        ModelError: a folder that is missing or incomplete, or has no cross-attention.
        NumericsError: the solve has no finite answer.
    """
    options.check()
    progress("reading the K and V weights")
    weights = cross_attention_weights(folder)
    progress("embedding the prompts")
    encoder = TextEncoder(folder)
    concepts = _concepts(encoder, options)
    kept = (embedding.tokens for embedding in encoder.embed(options.keep))
    progress("solving")
    solved = rece(
        list(weights.values()),
        concepts,
        kept,
        uce_scales=Scales(erase=options.erase_scale, keep=options.keep_scale, ridge=options.regularization),
        epoch_scales=EPOCH_SCALES,
        epochs=options.epochs if options.method == "rece" else 0,
        ridge=options.ridge,
        technique=options.technique,
        anchor=options.anchor,
        rule=RULES[options.rule],
    )
    metadata = EditMetadata(
        excise_version=excise.__version__,
        method=options.method,
        preset=options.preset,
        recipe={**asdict(options), "epochs": len(solved.epochs)},
        concepts=tuple(
            Erased(erase=concept, to=target) for concept, target in zip(options.erase, options.targets, strict=True)
        ),
        kept=Kept.of(options.keep),
        token_rule=options.rule,
        family="stable-diffusion",
        streams=(Stream(name="text", dim=solved.transform.dim, sites=tuple(weights)),),
        weights_fingerprint=fingerprint(as_float32(weights)),
        text_encoder_fingerprint=encoder.fingerprint,
    )
    return Edit(metadata, _tensors(solved.transform, "text"))


def _tensors(transform: Transform, stream: str) -> dict[str, Any]:
    """The arrays of the edit file."""
    if transform.is_shared:
        left, right = transform.factors()
        tensors: dict[str, torch.Tensor] = {"transform": transform.matrix(0), "left": left, "right": right}
    else:
        tensors = {
            f"steps.{number}.{name}": getattr(step, name)
            for number, step in enumerate(transform.steps)
            for name in ("shared", "scaled", "scalars")
        }
    return {f"{stream}.{name}": tensor.contiguous().numpy() for name, tensor in tensors.items()}
