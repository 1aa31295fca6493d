"""YAML as a model: an error names the line and the field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from excise.errors import UsageError
from excise.printable import one_line, printable, short
from excise.strict_yaml import Where, nearest_line, parse_mapping

M = TypeVar("M", bound=BaseModel)


class Problem(ValueError):
    """What a model's own check finds wrong, and where below that model."""

    def __init__(self, where: Where, problem: str) -> None:
        super().__init__(problem)
        self.where = where


@dataclass(frozen=True)
class YamlDocument:
    """A YAML mapping and the line of everything in it."""

    label: str  #: the file's name, for errors
    data: Mapping[str, Any]
    lines: Mapping[Where, int]  #: from 1

    def refusal(self, where: Where, problem: str) -> UsageError:
        """The error about a field, with the line of it or of what it should be in."""
        line = nearest_line(self.lines, where)
        field = ".".join(printable(part) for part in where)
        return UsageError(f"{self.label}:{line}: {field + ': ' if field else ''}{problem}")


def parse_yaml(content: bytes, label: str) -> YamlDocument:
    """The mapping that ``content`` spells.

    Raises:
        UsageError: too large, not UTF-8, not YAML, a key that stands twice, an alias, or no mapping.
    """
    read = parse_mapping(content, label, first="format: 1")
    return YamlDocument(label, read.data, read.lines)


def validated(model: type[M], document: YamlDocument) -> M:
    """The document as a ``model``, whose fields' descriptions say what to give.

    Raises:
        UsageError: a field that is missing, unknown or of a wrong value, the first of them.
    """
    try:
        return model.model_validate(document.data)
    except ValidationError as problems:
        # Of several, the unknown field first: a misspelt one is also missing.
        details = sorted(problems.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")[0]
    kind, loc = details["type"], tuple(details["loc"])
    where, value, models, asked = _place(model, document.data, loc[:-1] if kind == "extra_forbidden" else loc)
    if kind == "extra_forbidden":
        known = list(dict.fromkeys(name for one in models for name in one.model_fields))
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(known)}"
        raise document.refusal((*where, loc[-1]), f"unknown field: {hint}")
    if kind.startswith("union_tag"):
        tags = [(name, tag) for one in models for name, tag in _tag(one).items()]
        raise document.refusal((*where, tags[0][0]), f"give one of {', '.join(str(tag) for _, tag in tags)}")
    if kind == "value_error":
        error = details["ctx"]["error"]
        raise document.refusal((*where, *(error.where if isinstance(error, Problem) else ())), str(error))
    give = f"give {asked}" if asked else one_line(details["msg"])
    if kind == "missing":
        raise document.refusal((*where, loc[-1]), f"is missing: {give}")
    raise document.refusal(where, f"{short(value)}: {give}")


def _place(model: type[BaseModel], value: Any, loc: Where) -> tuple[Where, Any, list[type[BaseModel]], str]:
    """What a validation error's location means: the position, the value there, its possible models, what to give."""
    where: Where = ()
    models, asked = [model], ""
    for part in loc:
        if isinstance(part, int):
            if not isinstance(value, list) or part >= len(value):
                break
            where, value = (*where, part), value[part]
            continue
        if len(models) > 1 and (tagged := [one for one in models if part in _tag(one).values()]):
            # A union's location goes on with the tag of its branch, which may be a field's name too.
            models = tagged
            continue
        fields = [one.model_fields[part] for one in models if part in one.model_fields]
        if not fields:
            continue
        asked = next((field.description for field in fields if field.description), asked)
        if not isinstance(value, Mapping) or part not in value:
            break
        where, value = (*where, part), value[part]
        models = [one for field in fields for one in _models(field.annotation)]
    return where, value, models, asked


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation names, however deep in tuples and unions."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _tag(model: type[BaseModel]) -> dict[str, Any]:
    """The field that tells a union's branches apart and its value; empty where there is none."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return {name: get_args(field.annotation)[0]}
    return {}
