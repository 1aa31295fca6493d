"""The text format of protocol buffers, as far as Triton's ``config.pbtxt`` uses it, read and written without a schema.

A message is a sequence of named values. Reading one and writing it again keeps what a person set by hand; comments and
the layout are lost. Source: Protocol Buffers, "Text Format Language Specification".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from excise.errors import ArtefactError

_DEPTH = 64
_TOKEN = re.compile(
    r"""(?:\s|\#[^\n]*+)*+(?:
        (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<number>-?(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[fF]?)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<mark>[{}<>\[\]:,;])
      | (?P<end>\Z)
    )""",
    re.VERBOSE | re.ASCII,
)
_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|(.))", re.DOTALL)
_LETTERS = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}
_CLOSING = {"{": "}", "<": ">"}


class Word(str):
    """A bare identifier: a value of an enumeration."""

    __slots__ = ()


@dataclass(frozen=True)
class Message:
    """Named values in their order; a repeated field is several values of one name."""

    fields: tuple[tuple[str, str | Word | int | float | bool | Message], ...] = ()

    def all(self, name: str) -> tuple[str | Word | int | float | bool | Message, ...]:
        """The values of a field, none if it isn't there."""
        return tuple(value for one, value in self.fields if one == name)

    def messages(self, name: str) -> tuple[Message, ...]:
        """The values of a field that are messages."""
        return tuple(value for value in self.all(name) if isinstance(value, Message))

    def text(self, name: str) -> str | None:
        """The last value of a field if it is a string or an identifier; None otherwise."""
        values = self.all(name)
        return str(values[-1]) if values and isinstance(values[-1], str) else None

    def replaced(self, name: str, values: Sequence[str | Word | int | float | bool | Message]) -> Message:
        """The message with ``values`` in place of a field's, where the first of those was, or at the end."""
        names = [one for one, _ in self.fields]
        place = names.index(name) if name in names else len(names)
        before = [field for field in self.fields[:place] if field[0] != name]
        after = [field for field in self.fields[place:] if field[0] != name]
        return Message((*before, *((name, value) for value in values), *after))


def parse(text: str, source: str) -> Message:
    """The message that ``text`` holds; ``source`` is what an error calls it.

    Raises:
        ArtefactError: It isn't in the text format; the message names the line.
    """
    return _Parser(text, source).message(None, 0)


def write(message: Message) -> str:
    """The message as text, with a final newline."""
    return "".join(f"{line}\n" for line in _lines(message, ""))


def _lines(message: Message, indent: str) -> Iterator[str]:
    for name, group in groupby(message.fields, key=lambda field: field[0]):
        values = [value for _, value in group]
        if any(isinstance(value, Message) for value in values):
            for value in values:
                if isinstance(value, Message):
                    yield f"{indent}{name} {{"
                    yield from _lines(value, indent + "  ")
                    yield f"{indent}}}"
                else:
                    yield f"{indent}{name}: {_scalar(value)}"
        elif len(values) > 1:
            yield f"{indent}{name}: [{', '.join(_scalar(value) for value in values)}]"
        else:
            yield f"{indent}{name}: {_scalar(values[0])}"


def _scalar(value: object) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return '"' + "".join(one if one >= " " and one != "\x7f" else f"\\{ord(one):03o}" for one in escaped) + '"'
    return repr(value)


def _unescaped(token: str) -> bytes:
    def one(match: re.Match[bytes]) -> bytes:
        octal, hexadecimal, letter = match.groups()
        if octal is not None:
            return bytes([int(octal, 8) & 0xFF])
        if hexadecimal is not None:
            return bytes([int(hexadecimal, 16)])
        return _LETTERS.get(letter, letter)

    return _ESCAPE.sub(one, token[1:-1].encode())


class _Parser:
    """Reads one text from its start to its end."""

    def __init__(self, text: str, source: str) -> None:
        self._text, self._source, self._place = text, source, 0
        self._advance()

    def message(self, closing: str | None, depth: int) -> Message:
        if depth > _DEPTH:
            raise self._error(f"more than {_DEPTH} messages inside each other")
        found: list[tuple[str, str | Word | int | float | bool | Message]] = []
        while not self._at(closing):
            if self._kind != "word":
                raise self._error(f"{self._shown} in place of a field's name")
            name = self._take()
            colon = self._skip(":")
            if self._token in _CLOSING:
                found.append((name, self._inner(depth)))
            elif self._skip("["):
                found += [(name, value) for value in self._list(depth)]
            elif not colon:
                raise self._error(f"{self._shown} after {name}, in place of ':'")
            else:
                found.append((name, self._value()))
            if not self._skip(","):
                self._skip(";")
        self._advance()
        return Message(tuple(found))

    def _inner(self, depth: int) -> Message:
        return self.message(_CLOSING[self._take()], depth + 1)

    def _list(self, depth: int) -> Iterator[str | Word | int | float | bool | Message]:
        if self._skip("]"):
            return
        while True:
            yield self._inner(depth) if self._token in _CLOSING else self._value()
            if self._skip("]"):
                return
            if not self._skip(","):
                raise self._error(f"{self._shown} in a list, in place of ',' or ']'")

    def _value(self) -> str | Word | int | float | bool:
        kind = self._kind
        if kind == "string":
            data = b""
            while self._kind == "string":  # neighbouring strings are one
                data += _unescaped(self._take())
            return data.decode(errors="replace")
        if kind == "word":
            word = self._take()
            return word == "true" if word in ("true", "false") else Word(word)
        if kind == "number":
            number = self._take()
            if number.lstrip("-")[:2] in ("0x", "0X"):
                return int(number, 16)
            whole = re.fullmatch(r"-?\d+", number)
            return int(number) if whole else float(number.rstrip("fF"))
        raise self._error(f"{self._shown} in place of a value")

    def _at(self, closing: str | None) -> bool:
        if self._kind == "end" and closing is not None:
            raise self._error(f"the text ends before a {closing!r}")
        return self._kind == "end" if closing is None else self._token == closing

    def _skip(self, mark: str) -> bool:
        if self._kind == "mark" and self._token == mark:
            self._advance()
            return True
        return False

    def _take(self) -> str:
        token = self._token
        self._advance()
        return token

    def _advance(self) -> None:
        match = _TOKEN.match(self._text, self._place)
        if match is None:
            self._token = ""
            raise self._error("something that is no name, value or mark")
        self._kind = str(match.lastgroup)
        self._token = match[self._kind]
        self._place = match.end()

    @property
    def _shown(self) -> str:
        return repr(self._token) if self._token else "the end"

    def _error(self, what: str) -> ArtefactError:
        line = self._text.count("\n", 0, self._place) + 1
        return ArtefactError(f"{self._source}, line {line}: {what}; put it right, or build the repository again")
