"""Prompts from files, one at a time, and the phrases that users write around a concept.

Phrases: Gandikota et al., *Unified Concept Editing*, WACV 2024, arXiv 2308.14761, as its published script expands
concepts. Files are read in bounded pieces: memory doesn't grow with a file's size, nor with the length of a line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from excise.errors import UsageError
from excise.printable import printable, short

#: Characters of one line, or of one CSV row: no text encoder reads a fraction of it.
LIMIT = 100_000

Expansion = Literal["artist", "object", "none"]

PHRASES: dict[Expansion, tuple[str, ...]] = {
    "artist": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
    "none": (),
}


def expand(concepts: Iterable[str], kind: Expansion) -> tuple[str, ...]:
    """Each concept followed by the phrases around it: six prompts each, or one for ``none``.

    Concepts and targets expand alongside, prompt by prompt. An empty target has nothing to phrase: it is repeated.

    Raises:
        UsageError: an unknown kind.
    """
    if kind not in PHRASES:
        raise UsageError(f"expand = {kind!r}: give one of {', '.join(PHRASES)}")
    return tuple(
        phrase.replace("{}", concept) if concept.strip() else concept
        for concept in concepts
        for phrase in ("{}", *PHRASES[kind])
    )


def paired(concepts: Sequence[str], targets: Sequence[str], kind: Expansion) -> tuple[tuple[str, str], ...]:
    """Every concept and its target, expanded.

    Args:
        concepts: what to erase.
        targets: one for all, or one for each.
        kind: as in ``expand``.

    Raises:
        UsageError: nothing to erase, another number of targets, or a concept that is blank, twice there or its own
            target; spaces don't tell two prompts apart.
    """
    if not concepts:
        raise UsageError("nothing to erase: give --erase TEXT, or a recipe or preset that names its concepts")
    if len(targets) not in (1, len(concepts)):
        count = len(concepts)
        raise UsageError(f"{len(targets)} targets for {count} concepts: give --to once, or once for each --erase")
    for concept in concepts:
        if not concept.strip():
            raise UsageError(f"the concept {concept!r} is empty: --erase takes the words that name it")
    aims = tuple(targets) * len(concepts) if len(targets) == 1 else targets
    pairs = tuple(zip(expand(concepts, kind), expand(aims, kind), strict=True))
    seen: set[str] = set()
    for concept, target in pairs:
        if words(concept) in seen:
            raise UsageError(f"the concept {short(concept)} is given twice: remove one")
        if words(concept) == words(target):
            raise UsageError(f"the concept {short(concept)} is its own target: give another --to")
        seen.add(words(concept))
    return pairs


def words(prompt: str) -> str:
    """What a tokenizer makes the same tokens of: the prompt without superfluous spaces."""
    return " ".join(prompt.split())


def read_prompts(spec: str) -> Iterator[str]:
    """The prompts of a text file, one a line, or of a column of a CSV file with a header, as ``PATH:COLUMN``.

    UTF-8, with or without a byte order mark; spaces around a prompt are dropped and blank ones are skipped; ``#`` is a
    character like any other. A path that exists is never split at its colons.

    Raises:
        UsageError: missing or a folder (at once); while reading: unreadable, not UTF-8, a line over ``LIMIT``
            characters, an unknown column, a row without it, broken quotes, or no prompt at all.
    """
    path, column = _locate(spec)
    if path.is_dir():
        raise UsageError(f"{printable(path)} is a folder: name a file of prompts")
    return _prompts(path, column)


def _locate(spec: str) -> tuple[Path, str | None]:
    """The path and the column, the longest path that exists."""
    ends = [len(spec), *(index for index in range(len(spec) - 1, 0, -1) if spec[index] == ":")]
    for end in ends:
        path = Path(spec[:end])
        try:
            found = path.exists()
        except (OSError, ValueError):
            # Too long for a path, or a NUL in it.
            found = False
        if found and spec[:end].strip():
            column = spec[end + 1 :] if end < len(spec) else None
            return path, column
    raise UsageError(f"{printable(spec)} doesn't exist: name a file of prompts, or PATH:COLUMN for a CSV file")


def _prompts(path: Path, column: str | None) -> Iterator[str]:
    shown, empty = printable(path), True
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{shown} can't be read: {error.strerror}") from error
    with file:
        if column is None and path.suffix.lower() == ".csv":
            columns = _listed(next(_rows(file, shown), (0, []))[1])
            raise UsageError(f"{shown} is a CSV file: name a column as {shown}:COLUMN, one of {columns}")
        lines = (text for _, text in _lines(file, shown)) if column is None else _cells(file, shown, column)
        for line in lines:
            if prompt := line.strip():
                empty = False
                yield prompt
    if empty:
        raise UsageError(f"{shown} has no prompts: write one a line")


def _lines(file: BinaryIO, shown: str) -> Iterator[tuple[int, str]]:
    """The lines with their ends, and their numbers from 1."""
    number = offset = 0
    longest = 4 * LIMIT + 8
    while True:
        try:
            line = file.readline(longest)
        except OSError as error:
            raise UsageError(f"{shown} can't be read: {error.strerror}") from error
        if not line:
            return
        number += 1
        size = len(line)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode() if size < longest else ""
        except UnicodeDecodeError as error:
            at = offset + size - len(line) + error.start
            raise UsageError(f"{shown}:{number}: byte {at} isn't UTF-8: save the file as UTF-8") from error
        if size == longest or len(text.rstrip("\r\n")) > LIMIT:
            raise UsageError(f"{shown}:{number}: longer than {LIMIT} characters: put one prompt on each line")
        if "\0" in text:
            raise UsageError(f"{shown}:{number}: holds a zero byte: save the file as plain text in UTF-8")
        offset += size
        yield number, text


def _rows(file: BinaryIO, shown: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file that aren't blank, and the number of the line that each ends on."""
    number = size = 0

    def texts() -> Iterator[str]:
        # A quoted cell may span lines: without its end quote, all that follow.
        nonlocal number, size
        for number, text in _lines(file, shown):
            size += len(text)
            if size > LIMIT + 2:
                raise UsageError(f"{shown}:{number}: a row longer than {LIMIT} characters: is a quote missing?")
            yield text

    rows = csv.reader(texts(), strict=True)
    while True:
        size = 0
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UsageError(
                f"{shown}:{number}: not CSV, {error}: put cells with quotes or commas in quotes"
            ) from error
        if row is None:
            return
        if row:
            yield number, row


def _cells(file: BinaryIO, shown: str, column: str) -> Iterator[str]:
    """One column of a CSV file."""
    rows = _rows(file, shown)
    _, header = next(rows, (0, []))
    names = [name.strip() for name in header]
    if names.count(column) != 1:
        problem = "has no column" if column not in names else "has more than one column"
        raise UsageError(f"{shown} {problem} {printable(column)!r}: its columns are {_listed(names)}")
    index = names.index(column)
    for number, row in rows:
        if index >= len(row):
            raise UsageError(f"{shown}:{number}: {len(row)} cells, the header has {len(names)}: complete the row")
        yield row[index]


def _listed(names: Iterable[str]) -> str:
    return printable(", ".join(name for name in names if name.strip()))[:200].strip() or "none, its first line is empty"
