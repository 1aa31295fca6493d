"""An exported folder as a technique of the public benchmark eval-unlearn, judged in ONNX Runtime, without PyTorch.

eval-unlearn (PyPI, 1.1) finds techniques by the entry point group ``eval_unlearn.techniques``. It makes one from the
``config`` of its run file, ``technique(**config)``, and asks it for every batch of prompts with ``generate(prompts=…,
seed=…)``, which returns as many PIL images. Nothing of the benchmark is imported here. In its run file:

    "technique": {"name": "excise", "config": {"folder": "sd-onnx", "edit": "nudity.safetensors", "provider": "cuda"}}

Two of its habits are kept, which excise's own evaluations don't have. The benchmark's own techniques run in diffusers,
which reads the first tokens of a prompt that is too long; so does this one, and says how many were cut. They take a
batch's seed for its first image and count on from it; the benchmark's command line gives none, and then the seeds
start at the option ``seed`` and go on over the whole run, so that a run can be repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from excise.console import say
from excise.editfile import load_edit
from excise.errors import ArtefactError, UsageError
from excise.manifest import NAME, first_problem, verify
from excise.serve.bank import edit_indices, read_bank
from excise.serve.onnx_component import Provider
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from excise.serve.tokenizer import PromptTokenizer


class TechniqueOptions(BaseModel):
    """What the ``config`` of the technique may say. An unknown or misspelt option is an error, unlike the benchmark's.

    ``provider``, ``device``, ``threads``, ``batch_size``, ``tf32`` and ``engine_cache`` are ``OnnxRuntime``'s.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    folder: str = Field(min_length=1)  #: what ``excise export`` wrote
    #: An edit file that takes the place of the folder's own edit, in memory; of a bank, the one of its edits to judge.
    edit: str | None = Field(default=None, min_length=1)
    provider: Provider = "cpu"
    device: int = Field(default=0, ge=0)  #: the GPU's number
    threads: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    tf32: bool = False
    engine_cache: str | None = Field(default=None, min_length=1)
    num_inference_steps: int = Field(default=50, ge=1)
    guidance_scale: float = 7.5
    seed: int = Field(default=0, ge=0)  #: of the first image, where the benchmark gives no seed
    #: Read the first tokens of a prompt that is too long; otherwise it ends the run.
    truncate: bool = True
    #: What the benchmark's own checks and reports call the concept. No image depends on it.
    erase_concept: str | None = None


class CuttingTokenizer(PromptTokenizer):
    """Reads the first tokens of a longer prompt, the last of them the end token, as diffusers' pipelines do."""

    def tokens(self, prompt: str) -> list[int]:
        """At most ``max_length`` token ids, begin and end included. Raises ``UsageError`` for what isn't text."""
        tokens = super().tokens(prompt)
        return tokens if len(tokens) <= self.max_length else [*tokens[: self.max_length - 1], self.eos_token_id]

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than are read."""
        return len(super().tokens(prompt)) > self.max_length


class ExciseTechnique:
    """An export of excise or Optimum. ``options`` are those of ``TechniqueOptions``.

    Raises:
        UsageError: an unknown option, a value that can't be used, a provider that this machine hasn't, or an edit that
            a bank doesn't hold.
        ArtefactError: the folder is incomplete, can't be loaded or isn't as its manifest says, or keeps no unedited
            weights for ``edit`` to start from.
        ModelError: a scheduler, tokenizer or model that isn't supported.
        EditError: ``edit`` can't be read, or is another model's.
    """

    def __init__(self, **options: Any) -> None:
        try:
            self.options = TechniqueOptions.model_validate(options)
        except ValidationError as error:
            offered = ", ".join(TechniqueOptions.model_fields)
            raise UsageError(f"technique excise: {first_problem(error)}; its options are {offered}") from error
        folder = Path(self.options.folder)
        # What is judged has to be what was exported: a benchmark's figure is quoted without the folder.
        if (folder / NAME).is_file() and (problems := verify(folder)):
            raise ArtefactError(f"{folder} isn't as its manifest says: {problems[0]}; export it again")
        edit = load_edit(Path(self.options.edit)) if self.options.edit else None
        bank = read_bank(folder / "unet" / "model.onnx")
        #: The edit that each request names, of a bank; None for a folder that has one edit for all.
        self._requested = edit.id if edit is not None and bank is not None else None
        if bank is not None:
            edit_indices(bank, [self._requested])
        cache = self.options.engine_cache
        self.runtime = OnnxRuntime(
            folder,
            name="excise",
            provider=self.options.provider,
            threads=self.options.threads,
            batch_size=self.options.batch_size,
            edit=edit if bank is None else None,
            device=self.options.device,
            tf32=self.options.tf32,
            engine_cache=Path(cache) if cache else None,
        )
        if self.options.truncate:
            limit = self.runtime.tokenizer.max_length
            self.runtime.tokenizer = CuttingTokenizer(folder / "tokenizer", max_length=limit)
            if self.runtime.tokenizer_2 is not None:
                self.runtime.tokenizer_2 = CuttingTokenizer(folder / "tokenizer_2", max_length=limit)
        self._asked = 0
        say(f"judging {folder} in ONNX Runtime ({self.options.provider}), edit {self.edit_id or 'none'}")

    @property
    def edit_id(self) -> str | None:
        """The id of the edit that is judged; None for the model as it is."""
        return self._requested or self.runtime.edit_id

    def generate(
        self,
        prompts: Sequence[str],
        seed: int | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        **unknown: Any,
    ) -> list[Image.Image]:
        """One RGB image a prompt, in their order.

        Args:
            prompts: Of one batch.
            seed: Of the first image; the next has the next one. None goes on from the images before, the first of
                which had the option ``seed``.
            num_inference_steps: Instead of the option's.
            guidance_scale: Instead of the option's.
            unknown: Refused; what a technique doesn't do must not be asked of it in vain.

        Raises:
            UsageError: a prompt that isn't text, a seed, number of steps or scale that can't be used, or another
                argument.
            PromptTooLong: a prompt has more tokens than the text encoder reads, and ``truncate`` is off.
            ArtefactError: the models return something that isn't an image.
        """
        if unknown:
            raise UsageError(f"technique excise: generate has no argument {', '.join(map(repr, sorted(unknown)))}")
        if isinstance(prompts, str):
            raise UsageError(f"technique excise: prompts={prompts[:60]!r} is one text: give a list of them")
        first = self.options.seed + self._asked if seed is None else seed
        requests = [Request(prompt, seed=first + place, edit=self._requested) for place, prompt in enumerate(prompts)]
        tokenizer = self.runtime.tokenizer
        if isinstance(tokenizer, CuttingTokenizer) and (cut := sum(map(tokenizer.is_cut, prompts))):
            say(f"{cut} of {len(prompts)} prompts are too long: their first {tokenizer.max_length} tokens were read")
        steps = self.options.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.options.guidance_scale if guidance_scale is None else guidance_scale
        with tqdm(desc="excise", unit="step", file=sys.stderr, leave=False, disable=None) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            images = self.runtime.generate(requests, num_inference_steps=steps, guidance_scale=scale, progress=report)
        if seed is None:
            self._asked += len(requests)
        return [Image.fromarray(image) for image in images]
