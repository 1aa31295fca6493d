"""The options that make a recipe, shared by the commands that solve for an edit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from excise.console import needs
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.edit.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


def recipe_options(function: F) -> F:
    """The options that make a recipe; each overrides the recipe's or the preset's value."""
    options = [
        click.option("--preset", metavar="NAME", help="nudity, unsafe, artist, object-hard, object-easy, weapons."),
        click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="A recipe, as YAML."),
        click.option("--erase", multiple=True, metavar="TEXT", help="A concept to erase; repeat for several."),
        click.option(
            "--erase-file", "erase_files", multiple=True, metavar="FILE[:COLUMN]", help="Concepts, one a line, or CSV."
        ),
        click.option("--to", multiple=True, metavar="TEXT", help="What it becomes: once, or once for each --erase."),
        click.option("--keep", multiple=True, metavar="TEXT", help="A prompt to hold; repeat for several."),
        click.option(
            "--keep-file", "keep_files", multiple=True, metavar="FILE[:COLUMN]", help="Prompts to hold; any number."
        ),
        click.option(
            "--expand", type=click.Choice(["none", "artist", "object"]), help="Also erase UCE's phrases around it."
        ),
        click.option(
            "--method",
            metavar="NAME",
            help="rece (default), uce, speed, dp, trce1 or leace, which are solved in seconds; or esd-x, esd-u, "
            "esd-full, ca, ca-full, sa or sa-u, which train.",
        ),
        click.option("--epochs", metavar="N|auto", help="RECE epochs, or auto: as many as help."),
        click.option("--ridge", type=float, help="λ of RECE's eq. 8."),
        click.option("--erase-scale", type=float, help="s of the UCE stage."),
        click.option("--keep-scale", metavar="FLOAT|auto", help="λ₁ of the UCE stage; auto is max(0.1, 1/kept)."),
        click.option("--regularization", type=float, help="λ₂ of the UCE stage."),
        click.option("--technique", type=click.Choice(["replace", "tensor"]), help="Aim of each erased token."),
        click.option(
            "--anchor",
            type=click.Choice(["current", "original"]),
            help="Weights that each RECE epoch edits: the current ones (as published), or the original ones with "
            "all embeddings found so far.",
        ),
        click.option("--rule", type=click.Choice(["last-subject", "all"]), help="Which tokens UCE's stage erases."),
        click.option("--projections", type=click.Choice(["both", "k", "v"]), help="Edit K, V or both."),
        click.option("--layers", metavar="REGEX", help="Edit only layers whose name matches."),
        click.option("--conditional-only", is_flag=True, default=None, help="Don't move the empty prompt at all."),
        click.option(
            "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="A figure of the method's own."
        ),
        click.option("--iterations", type=int, help="Steps of a method that trains; its parameter iterations."),
        click.option("--seed", type=int, help="Of a method that trains; its parameter seed."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def resolved(options: dict[str, Any]) -> Recipe:
    """The recipe of a command line.

    Raises:
        UsageError: an option, a preset or a recipe file that can't be used.
    """
    with needs():
        from excise.edit.recipe import load_recipe, resolve
    given = {name: value for name, value in options.items() if value not in (None, ())}
    recipe_file, preset = given.pop("recipe_file", None), given.pop("preset", None)
    if (scale := given.get("keep_scale")) is not None and scale != "auto":
        given["keep_scale"] = number("--keep-scale", scale)
    if (epochs := given.get("epochs")) is not None and epochs != "auto":
        given["epochs"] = _whole("--epochs", epochs)
    sites = {name: given.pop(name) for name in ("projections", "layers", "conditional_only") if name in given}
    parameters: dict[str, float] = dict(_parameter(text) for text in given.pop("parameters", ()))
    parameters |= {name: given.pop(name) for name in ("iterations", "seed") if name in given}
    overrides = {**given, **({"sites": sites} if sites else {}), **({"parameters": parameters} if parameters else {})}
    return resolve(preset, None if recipe_file is None else load_recipe(recipe_file), overrides)


def _parameter(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--parameter {text} must be NAME=VALUE, such as rho=0.7")
    return name, number(f"--parameter {name}", value)


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{option} {text} is neither a whole number nor auto") from None


def number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option} {text} is not a number") from None
