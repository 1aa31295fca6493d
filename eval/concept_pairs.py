"""Pairs of prompts that differ in one concept: what its concept vector is the mean difference of.

The second prompt of a pair never names the concept: CLIP gives "without a dog" much the embedding of "with a dog". So
the templates add the concept to a plain scene, as the published pairs do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final, Literal

from excise.errors import UsageError
from excise.eval.prompt_file import Columns, read_prompt_file
from excise.printable import short

#: What pictures are commonly of, so that a scene's own words cancel.
SCENES: Final = (
    "a photo of a street",
    "a photo of a kitchen",
    "a photo of a forest",
    "a photo of a beach",
    "a photo of a living room",
    "a photo of a garden",
    "a photo of an office",
    "a photo of a mountain",
    "a painting of a village",
    "a painting of a river",
    "a painting of a field",
    "a drawing of a house",
    "a picture of a person",
    "a picture of two people",
    "a picture of a table",
    "a picture on a white background",
)

#: How a concept is added to a scene.
TEMPLATES: Final = {"object": "{scene} with {concept}", "style": "{scene}, in the style of {concept}"}


@dataclass(frozen=True)
class PromptPair:
    """Two prompts that differ in the concept alone.

    Raises:
        UsageError: they don't differ, or one is blank.
    """

    shown: str  #: p⁺: with the concept
    absent: str  #: p⁻: without it

    def __post_init__(self) -> None:
        if not self.shown.strip() or not self.absent.strip():
            raise UsageError(f"the pair {short(self.shown)} and {short(self.absent)} is half empty: fill or remove it")
        if self.shown.split() == self.absent.split():
            raise UsageError(f"both prompts of a pair are {short(self.shown)}: name the concept in the first alone")


def template_pairs(
    concept: str, kind: Literal["object", "style"] = "object", scenes: Sequence[str] = SCENES
) -> tuple[PromptPair, ...]:
    """A pair for each scene: the scene with the concept, and the scene.

    Args:
        concept: as it reads in a sentence: "a gun", "Van Gogh".
        kind: which of ``TEMPLATES``.
        scenes: without the concept.

    Raises:
        UsageError: a blank concept, no scenes, or a kind that there isn't.
    """
    if not concept.strip():
        raise UsageError("the concept is blank: name one, such as 'a gun'")
    if kind not in TEMPLATES:
        raise UsageError(f"no template {short(kind)}: choose {' or '.join(TEMPLATES)}")
    return paired([TEMPLATES[kind].format(scene=scene, concept=concept.strip()) for scene in scenes], scenes)


def paired(shown: Sequence[str], absent: Sequence[str]) -> tuple[PromptPair, ...]:
    """Pairs of prompts that stand in two lists at the same place.

    Raises:
        UsageError: no prompts, or not as many in one as in the other.
    """
    if len(shown) != len(absent):
        raise UsageError(
            f"{len(shown)} prompts with the concept and {len(absent)} without: give pairs, one of each in a row"
        )
    if not shown:
        raise UsageError("no pair of prompts: give at least one prompt with the concept and one without")
    return tuple(PromptPair(first, second) for first, second in zip_longest(shown, absent))


def read_pairs(path: Path, *, shown: str = "sensitive prompt", absent: str = "normal prompt") -> tuple[PromptPair, ...]:
    """The pairs of a CSV file, one a row.

    Args:
        path: as ``read_prompt_file`` takes it.
        shown: the column of prompts with the concept; by default that of RECE's files, in Ring-A-Bell's it is
            ``prompt``.
        absent: the column of prompts without it; in Ring-A-Bell's file ``prompt1``.

    Raises:
        UsageError: a file that can't be read, a column that it hasn't, or a pair that is none.
    """
    rows = read_prompt_file(path, Columns(prompt=shown, negative_prompt=absent))
    return tuple(PromptPair(row.prompt.strip(), (row.negative_prompt or "").strip()) for row in rows)
