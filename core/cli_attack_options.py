"""The options that ``excise attack …``'s commands share, and those of a search's budget."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from excise.console import json_option, say
from excise.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

_pairs: dict[str, Any] = {"multiple": True, "metavar": "NAME=VALUE"}
_path = click.Path(path_type=Path)


def run_options(function: F) -> F:
    """Of attacks and replays: the protocol as ``excise eval`` takes it, and where results go."""
    return _all(
        function,
        click.option("--protocol", required=True, metavar="NAME|FILE", help="By which success is told."),
        click.option("--prompts", type=_path, help="The protocol's prompt file, or its folder."),
        click.option("--set", "parameters", help="A protocol's parameter, such as erased=church.", **_pairs),
        click.option("--network", "networks", help="Where a detector has its weights.", **_pairs),
        click.option("--steps", type=click.IntRange(1), metavar="N", help="Denoising steps, not the protocol's."),
        click.option("--scheduler", type=click.Choice(["protocol", "own"]), default="protocol", show_default=True),
        click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Images in a batch."),
        click.option("--device", default="cpu", show_default=True, help="Of detectors, and of the attacked model."),
        click.option("--out", type=_path, required=True, help="The run's folder; one that was begun is gone on with."),
        json_option,
    )


def attack_options(function: F) -> F:
    """Of all attacks: the models, the cases, and where what is found is replayed."""
    shared = run_options(function)
    return _all(
        shared,
        click.option(
            "--model", required=True, metavar="MODEL", help="A diffusers folder, hub id, or demo:model; ?dtype=, ?sld=."
        ),
        click.option("--edit", type=_path, metavar="FILE", help="Applied to MODEL, which is then attacked."),
        click.option("--base", metavar="MODEL", help="The unedited model.  [default: MODEL without the edit]"),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N erased cases only."),
        click.option("--sample", type=click.IntRange(1), metavar="N", help="N erased cases, from every label."),
        click.option("--sample-seed", type=click.IntRange(0), default=0, show_default=True, help="Of --sample."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of every case's search."),
        click.option(
            "--base-must-show/--all-cases",
            "base_must_show",
            default=True,
            show_default=True,
            help="Leave out cases that the unedited model doesn't show, or count all.",
        ),
        click.option(
            "--runtime",
            "runtimes",
            multiple=True,
            metavar="NAME=KIND:PLACE",
            help="Replay what is found there, as excise attack replay does; repeat it.",
        ),
    )


#: A setting of a search → what to say of it. The defaults are the published ones, and those of the settings' classes.
_BUDGETS: Mapping[str, str] = {
    "tokens": "Tokens that are searched.",
    "every": "The prompt's tokens to one learnable token.",
    "iterations": "Of the search; of each timestep for UnlearnDiffAtk.",
    "evaluate_every": "Iterations from one image to the next.",
    "population": "Rows of tokens, an even number.",
    "generations": "Of the search.",
    "timesteps": "Evenly spread; an image is made after each.",
    "learning_rate": "Of the optimiser.",
}


def budget_options(defaults: Mapping[str, int | float]) -> Callable[[F], F]:
    """Options for a search's settings, which the command gets as one dictionary, ``budget``."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(**given: Any) -> Any:
            budget = {name: given.pop(name) for name in (*defaults, "vocabulary")}
            return function(budget=budget, **given)

        vocabulary = click.option(
            "--vocabulary",
            type=click.Choice(["all", "words"]),
            default="all",
            show_default=True,
            help="Tokens to search: all, as published, or words that are read as they were searched.",
        )
        options = [
            click.option(
                f"--{name.replace('_', '-')}",
                type=click.IntRange(1) if isinstance(default, int) else click.FloatRange(0, min_open=True),
                default=default,
                show_default=True,
                help=_BUDGETS[name],
            )
            for name, default in defaults.items()
        ]
        return _all(command, *options, vocabulary)  # type: ignore[return-value]

    return decorate


def concept_options(function: F) -> F:
    """What names a concept's vector, which the command gets as one dictionary, ``concept``, and η."""

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        concept = {name: given.pop(name) for name in ("text", "style", "pairs", "vector")}
        return function(concept=concept, **given)

    return _all(
        command,
        click.option("--concept", "text", metavar="TEXT", help="Added to plain scenes, such as 'a gun'."),
        click.option("--style", is_flag=True, help="The concept is a style, such as 'Van Gogh'."),
        click.option("--pairs", type=_path, help="Or a CSV of prompts with and without it, as published by RECE."),
        click.option("--vector", type=_path, help="Or a concept vector, .safetensors or .npy."),
        click.option("--eta", type=float, default=3.0, show_default=True, help="How much of it is added."),
    )  # type: ignore[return-value]


def parsed_pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE`` pairs.

    Raises:
        UsageError: no name or value, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {text!r}: give NAME=VALUE")
        if name in found:
            raise UsageError(f"{option} {name} is given twice")
        found[name] = value
    return found


@contextmanager
def warnings_said() -> Iterator[None]:
    """Warnings as lines of progress."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **options: say(str(message))
        yield


def _all(function: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        function = option(function)
    return function
