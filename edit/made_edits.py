"""Edits by name in a folder: those that are missing are made, with a note beside each of how long it took.

    NAME.safetensors     the edit
    NAME.json            the seconds that it took, since an edit file holds no times
    NAME.training/       what a method that trains resumes from, until it is done

What is there is checked against its recipe, and taken as it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from excise.edit.recipe import Recipe
from excise.editfile import Edit, load_edit, save_edit
from excise.errors import ArtefactError
from excise.output import put_in_place

#: Solves or trains: a recipe, and the folder that a training resumes from.
Solve = Callable[[Recipe, Path], Edit]

#: Of a recipe, what an edit file holds as concepts instead.
_CONCEPTS = {"erase", "to", "keep"}


@dataclass(frozen=True)
class MadeEdits:
    """By name: the edits' files, and the seconds that each took to make."""

    files: Mapping[str, Path]
    seconds: Mapping[str, float]


def made_edits(
    folder: Path, recipes: Mapping[str, Recipe], solve: Solve, say: Callable[[str], None] = lambda message: None
) -> MadeEdits:
    """The edits of several recipes of one model; what is there already is taken as it is.

    Raises:
        ArtefactError: a file that is there is the edit of another recipe, or no edit.
        ExciseError: as ``solve`` raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for name, recipe in recipes.items():
        file, times = folder / f"{name}.safetensors", folder / f"{name}.json"
        if not file.exists():
            say(f"making the edit {name}")
            started = time.monotonic()
            edit = solve(recipe, folder / f"{name}.training")
            # A training that was resumed took longer than its last part.
            spent = time.monotonic() - started + _spent(times)
            put_in_place(times, (json.dumps({"seconds": spent}) + "\n").encode())
            save_edit(file, edit)
        _check(file, recipe)
        files[name], seconds[name] = file, _spent(times)
    return MadeEdits(files, seconds)


def _spent(times: Path) -> float:
    """The seconds noted in a file; 0 without one."""
    try:
        return float(json.loads(times.read_bytes())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _check(file: Path, recipe: Recipe) -> None:
    """Raise ``ArtefactError`` unless a file is the edit of a recipe."""
    made = load_edit(file).metadata
    settings = recipe.model_dump(mode="json", exclude=_CONCEPTS)
    erased = [concept for concept, _ in recipe.pairs()]
    if made.recipe != settings or [one.erase for one in made.concepts] != erased:
        raise ArtefactError(f"{file} was made by another recipe than is asked for now: choose another --out")
