"""YAML without its surprises: plain values, the line of each, and errors that name the line.

Read as ``yaml.safe_load`` reads, but: no tags, so no objects; no aliases, so a small file stays small; no key twice,
and none but text; ``1e-3`` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from excise.errors import UsageError
from excise.printable import one_line, short

#: Bytes of a document; some 5000 prompts, which take YAML two seconds.
LIMIT: Final = 2**17

#: Position in a document, outermost key first.
Where = tuple[str | int, ...]

# YAML 1.1 reads 1e-3 as text for want of a point.
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")

_SCALARS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))


@dataclass(frozen=True)
class YamlMapping:
    """Plain dicts, lists, texts, numbers, booleans and None, and the line of every value, from 1."""

    data: Mapping[str, Any]
    lines: Mapping[Where, int]


def nearest_line(lines: Mapping[Where, int], where: Where) -> int | None:
    """The line of a position, or of the innermost thing around it that has one."""
    return next((lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in lines), None)


def parse_mapping(content: bytes, label: str, *, first: str, too_large: str = "is it the right file?") -> YamlMapping:
    """The mapping that ``content`` spells.

    Args:
        label: the file's name, for errors.
        first: a first field, such as ``version: 1``, for who gives no mapping.
        too_large: what to do about a document that is.

    Raises:
        UsageError: too large, not UTF-8, not YAML, no mapping of plain values, a key that stands twice, or an alias.
    """
    if len(content) > LIMIT:
        raise UsageError(f"{label} is larger than {LIMIT // 1024} KiB: {too_large}")
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
        raise UsageError(f"{where}: not YAML, {one_line(error.problem or error.context or 'unreadable')}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{label}: not YAML, {one_line(str(error))}") from error
    except RecursionError as error:
        raise UsageError(f"{label}: nested too deep") from error
    if not isinstance(data, dict):
        raise UsageError(f"{label}: has no fields: write one a line, such as {first}")
    return YamlMapping(data, reader.lines)


class _Reader:
    """The plain values of a YAML document, and the line of each."""

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
            raise self._refusal(line, "an alias (*) repeats a value: write it again")
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
                raise self._refusal(line, f"{short(str(key.value))} is no field's name: put text in quotes")
            if key.value in mapping:
                raise self._refusal(line, f"{short(key.value)} is given twice: remove one")
            mapping[key.value] = self._plain(value, (*where, key.value))
        return mapping

    def _refusal(self, line: int, problem: str) -> UsageError:
        return UsageError(f"{self._label}:{line}: {problem}")
