"""What a file holds, as an error message shows it: on one line, short, and harmless to a terminal."""

from __future__ import annotations

from reprlib import Repr
from typing import Final

from excise.printable import printable

_REPR: Final = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_YAML: Final = {None: "null", True: "true", False: "false"}


def short(value: object) -> str:
    """A value from a file, spelt as in the file, and the middle of a long one left out."""
    if value is None or isinstance(value, bool):
        return _YAML[value]
    try:
        return printable(_REPR.repr(value))
    except ValueError:
        # Python refuses to spell integers of more than some thousand digits.
        return "a number of thousands of digits..."
