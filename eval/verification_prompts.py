"""The prompts that two runtimes of an edited model are compared on: erased, kept and neutral ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from excise.editfile import Edit
from excise.errors import UsageError

GROUPS = ("erased", "kept", "neutral")

#: Neither erased nor kept by most edits; what an edit names itself is left out.
NEUTRAL = ("a photo of a mountain lake", "an oil painting of a house", "a red car", "")

#: A concept in ``Edit.summary``, which is all that a manifest says of them: ``'gun' → ' '``.
_CONCEPT = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*") → """)


@dataclass(frozen=True)
class Prompts:
    """Prompts by group; a group without any is left out.

    Attributes:
        groups: By the names of ``GROUPS``, in that order; there is always ``erased``.
        source: Where the erased ones are from.
    """

    groups: dict[str, tuple[str, ...]]
    source: str


def choose_prompts(
    *,
    edit: Edit | None,
    summary: str | None,
    given: dict[str, Sequence[str]],
    limit: int,
) -> Prompts:
    """Prompts as given; else those of the edit file; else those that a manifest's summary of the edit names.

    Args:
        edit: Its concepts are erased, its listed kept prompts kept.
        summary: The edit on one line, as in a manifest's edit entry: it names up to three concepts and no kept prompts.
        given: By group; what is given for a group takes the place of all others.
        limit: At most so many of each group, spread evenly over the list.

    Raises:
        UsageError: There is nothing erased, or ``limit`` isn't positive.
    """
    if limit < 1:
        raise UsageError(f"--prompts {limit}: give at least 1 for each group")
    erased, kept, source = _known(edit, summary)
    if given.get("erased"):
        erased, source = tuple(given["erased"]), "--erased"
    if not erased:
        raise UsageError("what was erased isn't known: name --edit FILE, or the prompts with --erased TEXT")
    kept = tuple(given.get("kept") or kept)
    neutral = tuple(given.get("neutral") or (prompt for prompt in NEUTRAL if prompt not in {*erased, *kept}))
    groups = {"erased": erased, "kept": kept, "neutral": neutral}
    return Prompts({name: picked(prompts, limit) for name, prompts in groups.items() if prompts}, source)


def _known(edit: Edit | None, summary: str | None) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Erased and kept prompts, and where they are from."""
    if edit is not None:
        concepts = tuple(concept.erase for concept in edit.metadata.concepts)
        return concepts, edit.metadata.kept.prompts, "the edit file"
    return tuple(ast.literal_eval(text) for text in _CONCEPT.findall(summary or "")), (), "the manifest"


def picked(prompts: Sequence[str], limit: int) -> tuple[str, ...]:
    """At most ``limit`` distinct prompts, the first and the last among them, evenly spread."""
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) <= limit:
        return tuple(distinct)
    places = np.linspace(0, len(distinct) - 1, limit).round().astype(int) if limit > 1 else [0]
    return tuple(distinct[place] for place in places)
