"""Presets: recipes that come with excise, as YAML in ``edit/recipes``, and how such YAML is read.

The figures are the released RECE code's (Gong et al., ECCV 2024, arXiv 2407.12383): kept prompts, λ of eq. 8 and epochs
by kind of concept; where the paper's text differs, a preset's ``note`` says so.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from excise.errors import UsageError
from excise.named_file import read_named
from excise.printable import printable, short
from excise.strict_yaml import LIMIT, Where, nearest_line, parse_mapping

_RECIPES = Path(__file__).resolve().parent / "recipes"

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Source:
    """Where values came from.

    Attributes:
        name: for people: "recipe FILE", "preset NAME", "command line" or "default".
        label: the start of an error message.
        folder: what relative paths are relative to.
        lines: the line of every value by its position, counted from 1.
    """

    name: str
    label: str = ""
    folder: Path = Path()
    lines: Mapping[Where, int] = field(default_factory=dict)

    def refusal(self, where: Where, problem: str, *, value: object = ...) -> UsageError:
        """The error about a field, or about a ``value`` in it, that says where it is."""
        names = [printable(part) for part in where if isinstance(part, str)]
        shown = "" if value is ... else f" {short(value)}" if self is COMMAND_LINE else f" = {short(value)}"
        subject = f"--{names[-1].replace('_', '-')}" if self is COMMAND_LINE and names else ".".join(names)
        line = nearest_line(self.lines, where)
        place = self.label if line is None else f"{self.label}:{line}"
        return UsageError(": ".join(part for part in (place, subject + shown, problem) if part))


DEFAULTS = Source("default")
COMMAND_LINE = Source("command line")
#: Of a recipe made in Python.
GIVEN = Source("given", "recipe")


@dataclass(frozen=True)
class Document:
    """A YAML mapping: plain dicts, lists, strings, numbers, booleans and None, and where it came from."""

    data: Mapping[str, Any]
    source: Source


def preset_names() -> tuple[str, ...]:
    """Every preset that ``--preset`` and ``preset:`` take."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


@cache
def preset_document(name: str) -> Document:
    """A preset's YAML.

    Raises:
        UsageError: unknown.
    """
    if name not in preset_names():
        raise UsageError(f"unknown preset {name!r}: choose one of {', '.join(preset_names())}")
    path = _RECIPES / f"{name}.yaml"
    return parse(path.read_bytes(), name=f"preset {name}", label=f"preset {name}", folder=path.parent)


def read_document(path: Path) -> Document:
    """A recipe's YAML.

    Raises:
        UsageError: missing, a folder, unreadable, too large, not UTF-8, or not a YAML mapping.
    """
    shown = printable(path)
    content = read_named(path, LIMIT, folder="name a recipe file", missing=f"{shown} doesn't exist: name a recipe file")
    return parse(content, name=f"recipe {shown}", label=shown, folder=path.parent)


def parse(content: bytes, *, name: str, label: str, folder: Path) -> Document:
    """The document that ``content`` spells.

    Raises:
        UsageError: too large, not UTF-8, or not a YAML mapping of plain values.
    """
    read = parse_mapping(
        content,
        label,
        first="version: 1",
        too_large="put long lists into files and name them with erase_files and keep_files",
    )
    return Document(read.data, Source(name, label, folder, read.lines))


def validated(model: type[M], data: Mapping[str, Any], source: Source, within: Where = ()) -> M:
    """``data`` as a ``model``, whose fields' descriptions say what to give.

    Args:
        within: the position of ``data`` in its document.

    Raises:
        UsageError: an unknown field, or a value that a field doesn't take.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    where: Where = ()
    value: Any = data
    kind: Any = model
    asked = ""
    fields: list[str] = []
    for part in first["loc"]:
        # A union's location goes on with the name of its branch.
        if isinstance(part, str) and isinstance(value, Mapping) and part in value:
            by_name = {info.alias or name: info for name, info in getattr(kind, "model_fields", {}).items()}
            fields = list(by_name)
            asked = (by_name[part].description or "") if part in by_name else asked
            kind = by_name[part].annotation if part in by_name else None
        elif isinstance(part, int) and isinstance(value, list | tuple) and part < len(value):
            asked = "text: put it in quotes"
        else:
            break
        where, value = (*where, part), value[part]
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(where[-1]), fields, n=1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"give {', '.join(fields)}"
            if fields
            else "there is none here, remove it"
        )
        raise source.refusal((*within, *where), f"unknown field: {hint}")
    problem = f"{first['ctx']['error']}: " if first["type"] == "value_error" else ""
    raise source.refusal((*within, *where), f"{problem}give {asked}", value=value)


def spell(name: str, value: object, comment: str) -> str:
    """One field as YAML that ``parse`` reads back, with a comment beside its name."""
    if isinstance(value, list | tuple) and value:
        lines = yaml.safe_dump(list(value), default_style='"', allow_unicode=True, width=float("inf")).splitlines()
        return "\n".join([f"{name}:  # {printable(comment)}", *(f"  {line}" for line in lines)])
    if isinstance(value, str):
        text = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")
        bare = re.fullmatch("[a-z][a-z0-9-]*", value) and yaml.safe_load(value) == value
        shown = value if bare else text
    else:
        shown = json.dumps(list(value) if isinstance(value, tuple) else value)
    return f"{name}: {shown}  # {printable(comment)}"
