"""Files of prompts: CSV as the published prompt sets come, or text with one prompt a line.

Published sets are edited by hand, in spreadsheets and by scripts. What is read is what the file says or an error that
names the line; nothing is guessed but the encoding, and that with a warning.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from excise.errors import UsageError
from excise.eval.cases import SIDE
from excise.named_file import read_named
from excise.printable import printable, short
from excise.serve.denoising import LARGEST_KEY

#: Characters of a row: no text encoder reads a fraction of it, so a longer one has lost its closing quote.
ROW_LIMIT: Final = 100_000
#: Bytes of a file; COCO-30k has 2.4 MB.
FILE_LIMIT: Final = 2**28
#: Pixels of an image's side; more is a slip in the file, and would end in a machine without memory.
LARGEST_SIDE: Final = 4096

# ``int`` and ``float`` also take underscores, other scripts' digits and "nan". Spreadsheets write whole numbers as 7.0.
_WHOLE = re.compile(r"([0-9]{1,19})(?:\.0*)?")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?")


class PromptEncodingWarning(UserWarning):
    """A prompt file isn't UTF-8 and was read as Latin-1."""


class Columns(BaseModel):
    """The columns that are read; None is "not there", and whoever uses the rows decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(default="prompt", description="a column's name")
    seed: str | None = Field(default=None, description="a column's name, or null")
    guidance: str | None = Field(default=None, description="a column's name, or null")
    label: str | None = Field(default=None, description="a column's name, or null")
    id: str | None = Field(default=None, description="a column's name, or null for the row's number")
    negative_prompt: str | None = Field(default=None, description="a column's name, or null")
    width: str | None = Field(default=None, description="a column's name, or null for the model's own size")
    height: str | None = Field(default=None, description="a column's name, or null for the model's own size")

    def named(self) -> dict[str, str]:
        """What is read → its column."""
        return {name: column for name, column in self.model_dump().items() if column is not None}


@dataclass(frozen=True)
class PromptRow:
    """One prompt. What has no column is None."""

    line: int  #: that it starts on, from 1
    number: int  #: among the rows, from 0
    prompt: str  #: as in the file, with its spaces and line ends
    id: str  #: the row's number where there is no column of ids
    seed: int | None = None
    guidance_scale: float | None = None
    label: str | None = None
    negative_prompt: str | None = None
    width: int | None = None  #: pixels
    height: int | None = None


def read_prompt_file(
    path: Path,
    columns: Columns,
    *,
    duplicate_ids: Literal["refuse", "number"] = "refuse",
    empty_prompts: Literal["refuse", "keep"] = "refuse",
) -> tuple[PromptRow, ...]:
    """The prompts of a file, in its order.

    UTF-8 with or without a byte order mark; else Latin-1, as the web understands it (Windows-1252), with a warning. A
    ``.txt`` has one prompt a line, blank ones are skipped; a ``.tsv`` has tabs between its cells, anything else commas
    (RFC 4180: quotes are doubled inside quotes, and a quoted cell may span lines). Rows of empty cells are skipped.

    Args:
        duplicate_ids: what an id that stands twice means: an error, or that every row of the file goes by its number.
            Ids name files, so capitals don't tell two apart.
        empty_prompts: what a row without a prompt means: an error, since it is likely a mistake, or the empty prompt.

    Raises:
        UsageError: a file that can't be read, is too large, in UTF-16 or holds a zero byte; a missing column, with the
            names of those that are there; a row with too few or too many cells; an empty prompt, label or id; a seed or
            guidance scale that is no number; a side that is no multiple of 8 pixels; ids that stand twice; no prompt at
            all.

    Warns:
        PromptEncodingWarning: the file isn't UTF-8.
    """
    shown = printable(path)
    text = _decoded(_content(path, shown), shown)
    if path.suffix.lower() == ".txt":
        rows = _text_rows(text, columns, shown)
    else:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = _table_rows(text, delimiter, columns, shown, empty_prompts)
    if not rows:
        raise UsageError(f"{shown} has no prompts: write one a row")
    return _with_ids(rows, columns, shown, duplicate_ids)


def _content(path: Path, shown: str) -> bytes:
    what = "name a file of prompts"
    content = read_named(path, FILE_LIMIT, folder=what, missing=f"{shown} doesn't exist: {what}")
    if len(content) > FILE_LIMIT:
        raise UsageError(f"{shown} is larger than {FILE_LIMIT // 2**20} MiB: split it")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"{shown} is in UTF-16: save it as UTF-8")
    if (zero := content.find(b"\0")) >= 0:
        raise UsageError(f"{shown}:{_line(content, zero)}: holds a zero byte: save the file as plain text in UTF-8")
    return content


def _decoded(content: bytes, shown: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = _line(content, error.start)
    warnings.warn(
        f"{shown}:{line}: isn't UTF-8, read as Latin-1: check its accents, or save it as UTF-8",
        PromptEncodingWarning,
        stacklevel=3,
    )
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        # Five bytes mean nothing in Windows-1252.
        return content.decode("latin-1")


def _line(content: bytes, position: int) -> int:
    """The line that a byte is on, whichever line ends the file has."""
    return len(re.findall(rb"\r\n?|\n", content[:position])) + 1


def _text_rows(text: str, columns: Columns, shown: str) -> list[PromptRow]:
    if others := [column for name, column in columns.named().items() if name != "prompt"]:
        needed = ", ".join(map(printable, others))
        raise UsageError(f"{shown} has prompts alone, and the columns {needed} are needed: give a CSV file")
    rows: list[PromptRow] = []
    for line, prompt in enumerate(io.StringIO(text, newline=None), start=1):
        if len(prompt) > ROW_LIMIT:
            raise UsageError(f"{shown}:{line}: longer than {ROW_LIMIT} characters: put one prompt on each line")
        if prompt.strip():
            rows.append(PromptRow(line, len(rows), prompt.strip(), str(len(rows))))
    return rows


def _table_rows(
    text: str, delimiter: str, columns: Columns, shown: str, empty_prompts: Literal["refuse", "keep"]
) -> list[PromptRow]:
    table = _cells(text, delimiter, shown)
    _, header = next(table, (0, []))
    places = _places([name.strip() for name in header], columns, shown)
    rows: list[PromptRow] = []
    for line, cells in table:
        if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
            raise UsageError(
                f"{shown}:{line}: {len(cells)} cells, the header has {len(header)}: put cells with commas in quotes"
            )
        row = _Row(f"{shown}:{line}", cells, places, columns.named())
        rows.append(
            PromptRow(
                line=line,
                number=len(rows),
                prompt=(row.raw if empty_prompts == "keep" else row.text)("prompt") or "",
                id=row.word("id") or str(len(rows)),
                seed=row.seed(),
                guidance_scale=row.guidance(),
                label=row.word("label"),
                negative_prompt=row.raw("negative_prompt"),
                width=row.side("width"),
                height=row.side("height"),
            )
        )
    return rows


def _cells(text: str, delimiter: str, shown: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that aren't blank, and the number of the line that each starts on."""
    size = 0

    def lines() -> Iterator[str]:
        nonlocal size
        for line in io.StringIO(text, newline=""):
            size += len(line)
            if size > ROW_LIMIT:
                raise UsageError(f"{shown}:{start}: a row longer than {ROW_LIMIT} characters: is a quote missing?")
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        size, start = 0, reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UsageError(f"{shown}:{start}: not CSV, {error}: put cells with quotes or commas in quotes") from error
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield start, cells


def _places(header: list[str], columns: Columns, shown: str) -> Mapping[str, int]:
    """What is read → its place in a row."""
    for column in columns.named().values():
        if header.count(column) != 1:
            problem = "has more than one column" if column in header else "has no column"
            there = ", ".join(printable(name) for name in header if name) or "none, the file is empty"
            raise UsageError(f"{shown} {problem} {printable(column)!r}: its columns are {there[:300]}")
    return {name: header.index(column) for name, column in columns.named().items()}


@dataclass(frozen=True)
class _Row:
    """One row's cells by what they are read for."""

    where: str
    cells: list[str]
    places: Mapping[str, int]
    names: Mapping[str, str]

    def raw(self, name: str) -> str | None:
        return self.cells[self.places[name]] if name in self.places else None

    def text(self, name: str) -> str | None:
        """The cell as it is, not empty."""
        cell = self.raw(name)
        if cell is None:
            return None
        if not cell.strip():
            raise UsageError(f"{self.where}: {printable(self.names[name])} is empty: fill it, or remove the row")
        return cell

    def word(self, name: str) -> str | None:
        """The cell without the spaces around it, not empty."""
        return None if (cell := self.text(name)) is None else cell.strip()

    def seed(self) -> int | None:
        cell = self.word("seed")
        if cell is None:
            return None
        match = _WHOLE.fullmatch(cell)
        if match is None or int(match[1]) > LARGEST_KEY:
            raise self._refusal("seed", cell, f"give a whole number from 0 to {LARGEST_KEY}")
        return int(match[1])

    def guidance(self) -> float | None:
        cell = self.word("guidance")
        if cell is None:
            return None
        value = float(cell) if _NUMBER.fullmatch(cell) else math.inf
        if math.isinf(value):
            raise self._refusal("guidance", cell, "give a number of 0 or more, such as 7.5")
        return value

    def side(self, name: str) -> int | None:
        cell = self.word(name)
        if cell is None:
            return None
        match = _WHOLE.fullmatch(cell)
        if match is None or not SIDE <= int(match[1]) <= LARGEST_SIDE or int(match[1]) % SIDE:
            raise self._refusal(name, cell, f"give pixels, a multiple of {SIDE} up to {LARGEST_SIDE}")
        return int(match[1])

    def _refusal(self, name: str, cell: str, remedy: str) -> UsageError:
        return UsageError(f"{self.where}: {printable(self.names[name])} = {short(cell)}: {remedy}")


def _with_ids(
    rows: Iterable[PromptRow], columns: Columns, shown: str, duplicate_ids: Literal["refuse", "number"]
) -> tuple[PromptRow, ...]:
    rows, seen = tuple(rows), dict[str, PromptRow]()
    for row in rows:
        first = seen.setdefault(row.id.casefold(), row)
        if first is row:
            continue
        if duplicate_ids == "number":
            return tuple(replace(row, id=str(row.number)) for row in rows)
        raise UsageError(
            f"{shown}:{row.line}: {printable(columns.id)} {short(row.id)} is on line {first.line} already: ids name "
            "image files, so make them unique, or say duplicate_ids: number in the protocol"
        )
    return rows
