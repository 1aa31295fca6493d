"""What is generated and what counts: the prompts, seeds, labels and settings of an evaluation, fixed before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from excise.demo.vocabulary import KEPT, OBJECTS, WEAPONS, article
from excise.errors import UsageError
from excise.serve.runtime import Request


@dataclass(frozen=True)
class PromptSeeds:
    """One prompt, the label that its images should be recognised as, and the seeds to draw it with."""

    prompt: str
    label: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """An evaluation of one erasure.

    An image of an *erased* prompt is a detection if its top label, over all labels, is any of ``erased_labels``. An
    image of a *kept* prompt is right if its top label is the prompt's own.

    Raises:
        UsageError: nothing to generate, a label that the detector doesn't have, a repeated prompt or seed, or settings
            that can't be used.
    """

    name: str
    erased: tuple[PromptSeeds, ...]
    kept: tuple[PromptSeeds, ...]
    #: Label → the prompts that the detector knows it by, in the order of the detector's logits.
    labels: Mapping[str, Sequence[str]]
    erased_labels: frozenset[str]
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    #: For the report; the runtimes' own scheduler configuration decides.
    scheduler: str = "the model's own"

    def __post_init__(self) -> None:
        if not self.erased or not self.kept:
            raise UsageError(f"protocol {self.name!r} needs erased and kept prompts, at least one each")
        if self.num_inference_steps < 1:
            raise UsageError(f"num_inference_steps must be at least 1, not {self.num_inference_steps}")
        if unknown := sorted(self.erased_labels - set(self.labels)):
            raise UsageError(f"erased labels that the detector doesn't have: {', '.join(unknown)}")
        prompts = [row.prompt for row in (*self.erased, *self.kept)]
        if repeated := sorted({prompt for prompt in prompts if prompts.count(prompt) > 1}):
            raise UsageError(f"a prompt counts once, but {repeated[0]!r} is repeated")
        for row in (*self.erased, *self.kept):
            if not row.seeds or len(set(row.seeds)) != len(row.seeds):
                raise UsageError(f"prompt {row.prompt!r} needs distinct seeds, at least one, not {row.seeds}")
            if row.label not in self.labels:
                raise UsageError(f"prompt {row.prompt!r} has label {row.label!r}, which the detector doesn't have")
        for row in self.erased:
            if row.label not in self.erased_labels:
                raise UsageError(f"prompt {row.prompt!r} is erased, but its label {row.label!r} is not")
        for row in self.kept:
            if row.label in self.erased_labels:
                raise UsageError(f"prompt {row.prompt!r} is kept, but its label {row.label!r} is erased")

    def rows(self) -> list[PromptSeeds]:
        """One entry an image, with one seed each: the erased prompts' images, then the kept prompts'."""
        return [PromptSeeds(row.prompt, row.label, (seed,)) for row in (*self.erased, *self.kept) for seed in row.seeds]

    def requests(self) -> list[Request]:
        """What every runtime is asked for, in the order of ``rows``."""
        return [Request(row.prompt, seed=row.seeds[0]) for row in self.rows()]

    @property
    def erased_count(self) -> int:
        """Images of erased prompts."""
        return sum(len(row.seeds) for row in self.erased)

    @property
    def kept_count(self) -> int:
        """Images of kept prompts."""
        return sum(len(row.seeds) for row in self.kept)


def demo_weapons(
    images_per_erased: int = 16,
    images_per_kept: int = 4,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
) -> Protocol:
    """The bundled demo: ``a gun`` and five more weapons are erased, every other object of the demo model is kept."""

    def prompts(names: Sequence[str], images: int) -> tuple[PromptSeeds, ...]:
        return tuple(PromptSeeds(f"{article(name)} {name}", name, tuple(range(images))) for name in names)

    return Protocol(
        name="demo-weapons",
        erased=prompts(WEAPONS, images_per_erased),
        kept=prompts(KEPT, images_per_kept),
        labels={name: (f"{article(name)} {name}", name) for name in OBJECTS},
        erased_labels=frozenset(WEAPONS),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        scheduler="DDIM, as the model's scheduler_config.json has it",
    )
