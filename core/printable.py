"""What a file or a user gave, as an error message shows it: on one line, short, and harmless to a terminal."""

from __future__ import annotations

from reprlib import Repr
from typing import Final

_REPR: Final = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_YAML: Final = {None: "null", True: "true", False: "false"}


def printable(text: object) -> str:
    """``str(text)`` with line ends, control characters and halves of characters as escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))


def one_line(text: str) -> str:
    """``printable`` with every run of white space as one space."""
    return printable(" ".join(text.split()))


def short(value: object) -> str:
    """A value as Python and YAML spell it, and the middle of a long one left out."""
    if value is None or isinstance(value, bool):
        return _YAML[value]
    try:
        return printable(_REPR.repr(value))
    except ValueError:
        # Python refuses to spell integers of more than some thousand digits.
        return "a number of thousands of digits"
