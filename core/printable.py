"""Text from a file as an error message shows it: on one line, and harmless to a terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    """``str(text)`` with line ends, control characters and halves of characters as escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))
