"""Fields of a protocol buffer, found without its schema and without reading their values.

A message is a sequence of fields, each a tag and a value; a value of kind 2 has its length before it. Source: the
encoding of protocol buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple


class Span(NamedTuple):
    """Where a field lies: its number, its first byte, its value's first byte, and the byte after it."""

    number: int
    start: int
    value: int
    end: int


def fields(stream: BinaryIO, start: int, end: int) -> Iterator[Span]:
    """Every field of the message between two places of a stream.

    Raises:
        EOFError: the message is cut off, or isn't one.
    """
    place = start
    while place < end:
        stream.seek(place)
        tag = varint(stream)
        number, kind = tag >> 3, tag & 7
        value = stream.tell()
        if kind == 2:
            length = varint(stream)
            value = stream.tell()
            after = value + length
        elif kind == 0:
            varint(stream)
            after = stream.tell()
        elif kind in (1, 5):
            after = value + (8 if kind == 1 else 4)
        else:
            raise EOFError
        if after > end or not number:
            raise EOFError
        yield Span(number, place, value, after)
        place = after


def varint(stream: BinaryIO) -> int:
    """The number at a stream's place, which moves behind it.

    Raises:
        EOFError: it is cut off, or longer than 70 bits.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise EOFError


def delimited(number: int, value: bytes) -> bytes:
    """A field with a length before its value."""
    return _encoded(number << 3 | 2) + _encoded(len(value)) + value


def _encoded(value: int) -> bytes:
    """A varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
