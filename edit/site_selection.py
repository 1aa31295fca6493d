"""Which of a model's sites a recipe edits: K, V or both, in all layers or in some."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from excise.edit.families import family_of
from excise.edit.recipe import Recipe
from excise.errors import UsageError


def selection(recipe: Recipe, folder: Path, *, values_only: bool) -> Callable[[str], bool]:
    """Whether a weight of that name is to be edited.

    Args:
        recipe: its ``sites``.
        folder: the model.
        values_only: the method leaves K alone unless the recipe says otherwise.

    Raises:
        UsageError: K or V of a model that projects the text once, for all of its layers.
    """
    projections = recipe.sites.projections
    attention = family_of(folder).component == "unet"
    if values_only and recipe.source("sites.projections").name == "default" and attention:
        projections = "v"
    if projections != "both" and not attention:
        raise UsageError(
            f"sites.projections = {projections}: {folder} projects the text for K and V together, use both"
        )
    layers = re.compile(recipe.sites.layers) if recipe.sites.layers else None
    suffix = {"both": "", "k": ".to_k.weight", "v": ".to_v.weight"}[projections]
    return lambda name: name.endswith(suffix) and (layers is None or layers.search(name) is not None)
