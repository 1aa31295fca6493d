"""Presets: recipes that come with excise, as YAML in ``edit/recipes``, and how such YAML is read.

The figures are the released RECE code's (Gong et al., ECCV 2024, arXiv 2407.12383): kept prompts, λ of eq. 8 and epochs
by kind of concept; where the paper's text differs, a preset's ``note`` says so.

YAML is read without any of its surprises: no tags, so no objects; no anchors, so a small file stays small; no key
twice; ``1e-3`` is a number.
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

from excise.edit.prompts import short
from excise.errors import UsageError
from excise.named_file import read_named
from excise.printable import printable

#: Bytes of a recipe: some 5000 prompts, which take YAML two seconds; longer lists go into files.
LIMIT = 2**17

_RECIPES = Path(__file__).resolve().parent / "recipes"

M = TypeVar("M", bound=BaseModel)

#: Position in a document, outermost key first.
Where = tuple[str | int, ...]


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
        line = next((self.lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in self.lines), None)
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
    if len(content) > LIMIT:
        raise UsageError(
            f"{label} is larger than {LIMIT // 1024} KiB: put long lists into files and name them with "
            "erase_files and keep_files"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{label} isn't UTF-8 (byte {error.start}): save it as UTF-8") from error
    try:
        reader = _Reader(text, label)
        data = reader.read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}" if mark else label
        raise UsageError(f"{where}: not YAML, {_one_line(error.problem or error.context or 'unreadable')}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{label}: not YAML, {_one_line(str(error))}") from error
    except RecursionError as error:
        raise UsageError(f"{label}: nested too deep: a recipe has two levels") from error
    if not isinstance(data, dict):
        raise UsageError(f"{label}: not a recipe: write fields, one a line, such as version: 1")
    return Document(data, Source(name, label, folder, reader.lines))


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


# YAML 1.1 reads 1e-3 as text for want of a point.
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")

_SCALARS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))


class _Reader:
    """The plain values of a YAML document, as ``yaml.safe_load`` gives them, and the line of each."""

    def __init__(self, text: str, label: str) -> None:
        self.lines: dict[Where, int] = {}
        self._loader = yaml.SafeLoader(text)
        self._label = label
        self._seen: set[int] = set()

    def read(self) -> Any:
        root = self._loader.get_single_node()
        return None if root is None else self._plain(root, ())

    def _plain(self, node: yaml.Node, where: Where) -> Any:
        line = self.lines[where] = node.start_mark.line + 1
        if id(node) in self._seen:
            # What an alias points at may be endless, or itself.
            raise self._refusal(line, "a value with an alias (*): a recipe has none, write the value again")
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._plain(item, (*where, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise self._refusal(line, f"a value of the type {short(node.tag)}: remove the type")
        if node.tag not in _SCALARS:
            raise self._refusal(line, f"{short(node.value)} is neither text nor a number: put text in quotes")
        if node.style is None and _EXPONENT.fullmatch(node.value):
            return float(node.value)
        try:
            return self._loader.construct_object(node)
        except (ValueError, LookupError) as error:
            raise self._refusal(line, f"{short(node.value)} can't be read: put text in quotes") from error

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise self._refusal(line, "no field has such a name: write one such as erase, to or keep")
            if key.value in mapping:
                raise self._refusal(line, f"{short(key.value)} is given twice: remove one")
            mapping[key.value] = self._plain(value, (*where, key.value))
        return mapping

    def _refusal(self, line: int, problem: str) -> UsageError:
        return UsageError(f"{self._label}:{line}: {problem}")


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
