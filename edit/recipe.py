"""A recipe: everything that decides an edit besides the model, as YAML.

A value comes from the command line, else from the recipe, else from the preset that either names, else it is a default:
the released RECE code's settings for an object (Gong et al., ECCV 2024, arXiv 2407.12383). Symbols are the paper's and
UCE's (Gandikota et al., WACV 2024, arXiv 2308.14761, eq. 3): s, λ₁, λ₂ weigh what is erased, kept and left alone; λ
is the ridge of RECE's eq. 8. Nothing here needs PyTorch.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, WithJsonSchema

from excise.edit.parameters import PARAMETERS, TRAINED, Frozen
from excise.edit.presets import (
    COMMAND_LINE,
    DEFAULTS,
    GIVEN,
    Source,
    preset_document,
    preset_names,
    read_document,
    spell,
    validated,
)
from excise.edit.prompts import Expansion, paired, read_prompts, words
from excise.errors import UsageError


def _sequence(value: object) -> object:
    """One text stands for a list of it."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _text(value: object) -> object:
    if isinstance(value, str):
        value.encode()  # half a character comes from a YAML escape, or a command line that isn't UTF-8
    return value


def _regular_expression(value: object) -> object:
    if isinstance(value, str):
        try:
            value.encode()
            with warnings.catch_warnings(action="error"):
                re.compile(value)
        except (re.error, RecursionError, OverflowError, Warning) as error:
            raise ValueError(f"not a regular expression ({error})") from error
    return value


Text = Annotated[str, BeforeValidator(_text)]
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
Texts = Annotated[tuple[Text, ...], BeforeValidator(_sequence), WithJsonSchema(_TEXTS)]


class Sites(Frozen):
    """Which of the model's cross-attention projections the edit moves."""

    projections: Literal["both", "k", "v"] = Field(default="both", description="both, k or v")
    layers: Annotated[str | None, BeforeValidator(_regular_expression)] = Field(
        default=None, description="a regular expression that a layer's name must match somewhere, or null for all"
    )
    conditional_only: bool = Field(default=False, description="true or false: leave the empty prompt's pass unedited")


class EpochScales(Frozen):
    """s, λ₁ and λ₂ of every RECE epoch."""

    erase: float = Field(default=1.0, gt=0, description="a positive number: s of the epochs")
    keep: float = Field(default=0.1, ge=0, description="a number of 0 or more: λ₁ of the epochs")
    regularization: float = Field(default=0.1, gt=0, description="a positive number: λ₂ of the epochs")


#: Fields of RECE's epochs.
_RECE_ONLY = frozenset({"epochs", "ridge", "epoch_scales", "anchor"})

#: Fields of the closed forms.
_SOLVED_ONLY = _RECE_ONLY | {"erase_scale", "keep_scale", "regularization", "technique", "rule"}


class Recipe(Frozen):
    """An edit, but for the model. ``resolve`` completes it; ``pairs`` and ``kept`` read its files."""

    version: Literal[1] = Field(default=1, description="1, the only format there is")
    preset: str | None = Field(default=None, description="the name of a preset to start from")
    note: Text = Field(default="", description="text for people")
    method: Literal[
        "rece", "uce", "speed", "dp", "trce1", "leace", "esd-x", "esd-u", "esd-full", "ca", "ca-full", "sa", "sa-u"
    ] = Field(
        default="rece",
        description="rece, uce, speed, dp, trce1 or leace; or a trained one: "
        "esd-x, esd-u, esd-full, ca, ca-full, sa or sa-u",
    )
    erase: Texts = Field(default=(), description="a list of texts: the concepts to erase")
    erase_files: Texts = Field(default=(), description="a list of paths: a text file, or PATH:COLUMN for a CSV file")
    to: Texts = Field(
        default=(" ",), description="a list of texts: what the concepts become, one for all or one for each"
    )
    keep: Texts = Field(default=("",), description="a list of texts: the prompts to hold")
    keep_files: Texts = Field(default=(), description="a list of paths: a text file, or PATH:COLUMN for a CSV file")
    expand: Expansion = Field(default="none", description="artist, object or none: the phrases around each concept")
    erase_scale: float = Field(default=1.0, gt=0, description="a positive number: s")
    keep_scale: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default=1.0, description="a number of 0 or more: λ₁; or auto, max(0.1, 1 / number kept)"
    )
    regularization: float = Field(default=0.5, gt=0, description="a positive number: λ₂")
    epochs: Annotated[int, Field(ge=0, le=1000)] | Literal["auto"] = Field(
        default=1, description="a whole number from 0, UCE alone, to 1000; or auto"
    )
    ridge: float = Field(default=0.1, gt=0, description="a positive number: λ of RECE's eq. 8")
    epoch_scales: EpochScales = Field(default=EpochScales(), description="fields erase, keep and regularization")
    technique: Literal["replace", "tensor"] = Field(default="replace", description="replace or tensor")
    anchor: Literal["current", "original"] = Field(default="current", description="current or original")
    rule: Literal["last-subject", "all"] = Field(default="last-subject", description="last-subject or all")
    sites: Sites = Field(default=Sites(), description="fields projections, layers and conditional_only")
    parameters: dict[str, int | float] = Field(default={}, description="numbers by name: the method's own figures")
    _sources: dict[str, Source] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        # The same edit, wherever the values came from.
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def source(self, path: str) -> Source:
        """Where the value at a path such as ``sites.layers`` came from."""
        return self._sources.get(path, GIVEN if path.split(".")[0] in self.model_fields_set else DEFAULTS)

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every concept and its target, from the list and the files, with the phrases of ``expand``.

        Raises ``UsageError`` for a file that can't be read or has no prompts, and as ``paired`` does.
        """
        concepts = list(self.erase)
        for spec in self.erase_files:
            concepts.extend(read_prompts(self._path("erase_files", spec)))
        try:
            return paired(concepts, self.to, self.expand)
        except UsageError as error:
            source = self.source("erase_files" if self.erase_files else "erase")
            if source in (DEFAULTS, COMMAND_LINE):
                raise
            raise source.refusal(("erase",), str(error)) from None

    def kept(self, pairs: Iterable[tuple[str, str]] | None = None) -> Iterator[str]:
        """The prompts to hold, from the list and then from the files, which are read as the iteration goes.

        ``pairs`` as ``pairs()`` gave them, where at hand: else the files of concepts are read again. Raises
        ``UsageError`` for a file that can't be read or has no prompts, or a prompt that is to be erased.
        """
        yield from self._kept(self.pairs() if pairs is None else pairs, self.keep_files)

    def keep_weight(self, number_kept: int) -> float:
        """λ₁; "auto" is ``max(0.1, 1 / number_kept)``, as published for artists."""
        return max(0.1, 1 / max(number_kept, 1)) if self.keep_scale == "auto" else self.keep_scale

    def _kept(self, pairs: Iterable[tuple[str, str]], files: Iterable[str]) -> Iterator[str]:
        erased = {words(concept) for concept, _ in pairs}

        def check(prompt: str, *where: str | int) -> str:
            if words(prompt) in erased:
                problem = "it is to be erased: remove it from one of the two"
                raise self.source(str(where[0])).refusal(where, problem, value=prompt)
            return prompt

        for index, prompt in enumerate(self.keep):
            yield check(prompt, "keep", index)
        for index, spec in enumerate(files):
            for prompt in read_prompts(self._path("keep_files", spec)):
                yield check(prompt, "keep_files", index)

    def _path(self, name: str, spec: str) -> str:
        return os.path.join(self.source(name).folder, spec)


def load_recipe(path: Path) -> Recipe:
    """A recipe as its file has it; ``resolve`` adds what it leaves open.

    Raises:
        UsageError: a file that can't be read, YAML that isn't a recipe, or a value that a field doesn't take.
    """
    document = read_document(path)
    if type(document.data.get("version")) is not int:
        raise document.source.refusal((), "version is missing or no number: start with the line version: 1")
    return _level(document.data, document.source)


def resolve(preset: str | None, recipe: Recipe | None, overrides: Mapping[str, Any]) -> Recipe:
    """The whole recipe: ``overrides`` (the command line) before ``recipe`` before the preset before the defaults.

    A level that gives concepts, in a list or in files, replaces all concepts of the levels below it; prompts to keep
    likewise. A level that changes the method drops the parameters of the levels below it. Files of prompts aren't read.

    Args:
        preset: a name that takes the place of the recipe's own preset.
        recipe: what ``load_recipe`` read.
        overrides: values by field, dicts for ``sites``, ``epoch_scales`` and ``parameters``; None is "not given".

    Raises:
        UsageError: an unknown preset, a value that a field doesn't take, or concepts that can't be used.
    """
    given = {
        name: {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else value
        for name, value in {**overrides, "preset": preset or overrides.get("preset")}.items()
        if value is not None
    }
    command_line = _level(given, COMMAND_LINE)
    levels = [level for level in (recipe, command_line) if level is not None]
    naming = next((level for level in reversed(levels) if level.preset is not None), Recipe())
    if naming.preset is not None:
        if naming.preset not in preset_names():
            problem = f"unknown preset: choose one of {', '.join(preset_names())}"
            raise naming.source("preset").refusal(("preset",), problem, value=naming.preset)
        document = preset_document(naming.preset)
        levels.insert(0, _level(document.data, document.source))
    values = Recipe().model_dump()
    sources: dict[str, Source] = {}
    for level in levels:
        _lay(level, values, sources)
    values["preset"], sources["preset"] = naming.preset, naming.source("preset")
    own, place = PARAMETERS[values["method"]], sources.get("parameters", DEFAULTS)
    values["parameters"] = validated(own, values["parameters"], place, ("parameters",)).model_dump(by_alias=True)
    resolved = Recipe.model_validate(values)
    resolved._sources.update({path: sources.get(path, DEFAULTS) for path in _paths(values)})
    if not resolved.erase_files:
        deque(resolved._kept(resolved.pairs(), files=()), maxlen=0)
    return resolved


def unread_by(method: str) -> frozenset[str]:
    """The fields of a recipe that a method leaves aside."""
    if method not in TRAINED:
        return frozenset() if method == "rece" else _RECE_ONLY
    target = {"to"} if method.startswith("esd") else set()
    kept = set() if method.startswith("sa") else {"keep", "keep_files"}
    return _SOLVED_ONLY | target | kept


def explain(recipe: Recipe) -> str:
    """The recipe as YAML with every field, and where each value came from as a comment; itself a recipe.

    Relative paths stay as written: the text belongs into the folder that they are relative to.
    """
    lines = []
    for name, value in recipe.model_dump().items():
        unread = f"; not read by {recipe.method}" if name in unread_by(recipe.method) else ""
        if isinstance(value, dict) and value:
            lines.append(f"{name}:")
            for key, item in value.items():
                lines.append("  " + spell(key, item, recipe.source(f"{name}.{key}").name + unread))
        else:
            lines.append(spell(name, value, recipe.source(name).name + unread))
    return "\n".join(lines) + "\n"


def _level(data: Mapping[str, Any], source: Source) -> Recipe:
    """One level's values, all from ``source``."""
    recipe = validated(Recipe, data, source)
    recipe._sources.update(dict.fromkeys(_paths(recipe.model_dump(exclude_unset=True)), source))
    return recipe


def _paths(values: Mapping[str, Any]) -> list[str]:
    """The dotted paths of all fields."""
    inner = [f"{name}.{key}" for name, value in values.items() if isinstance(value, dict) for key in value]
    return [*values, *inner]


def _lay(level: Recipe, values: dict[str, Any], sources: dict[str, Source]) -> None:
    """Put what a level gives over ``values``."""
    given = level.model_dump(exclude_unset=True)
    by_path = {path: level.source(path) for path in _paths(given)}
    for pair in (("erase", "erase_files"), ("keep", "keep_files")):
        for present, absent in (pair, pair[::-1]):
            if present in given and absent not in given:
                given[absent], by_path[absent] = (), by_path[present]
    if given.get("method", values["method"]) != values["method"]:
        values["parameters"] = {}
    values |= {name: {**values[name], **v} if isinstance(v, dict) else v for name, v in given.items()}
    sources.update(by_path)
