"""Values in error messages: one line, short, and nothing that moves a cursor."""

from __future__ import annotations

import pytest

from excise.printable import printable, short


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a mill, π 🪦", "a mill, π 🪦"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\u2028\u202e", r"\u2028\u202e"),
        ("\ud800", r"\ud800"),
        (7.5, "7.5"),
    ],
)
def test_what_is_not_printable_is_escaped(text: object, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "null"), (True, "true"), (False, "false"), (1, "1"), ("a\n'b'", r'''"a\n'b'"'''), ([], "[]")],
)
def test_values_are_spelt_as_yaml_has_them(value: object, shown: str) -> None:
    assert short(value) == shown


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, ["x" * 100] * 100, 10**5000, {str(n): "x" * 99 for n in range(99)}],
    ids=["text", "list", "number", "mapping"],
)
def test_long_values_stay_short(value: object) -> None:
    # Six items of a list, each of 60 characters, with commas and brackets, are the longest.
    assert len(short(value)) <= 377
    assert "..." in short(value) or short(value) == "a number of thousands of digits"
