"""Prompts come out as the file has them, whatever its size, and a bad file is a line that says where."""

from __future__ import annotations

import csv
import io
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from excise.edit.prompts import LIMIT, PHRASES, expand, paired, read_prompts, short, words
from excise.errors import UsageError
from excise.printable import printable

#: Texts that survive a file of lines.
PROMPT = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), max_size=30)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tmp_path / "prompts.txt"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(PROMPT), bom=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_lines_come_back(prompts: Path, texts: list[str], bom: bool, end: str) -> None:
    prompts.write_bytes(b"\xef\xbb\xbf" * bom + end.join(texts).encode())
    expected = [text.strip() for text in texts if text.strip()]
    # A second mark would be a character of the prompt.
    if expected and not texts[0].startswith("\ufeff"):
        assert list(read_prompts(str(prompts))) == expected


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)))
def test_a_csv_column_comes_back(prompts: Path, texts: list[str]) -> None:
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerows([["id", "caption, long", "seed"], *([index, text, 0] for index, text in enumerate(texts))])
    prompts.write_text(content.getvalue(), newline="")
    expected = [text.strip() for text in texts if text.strip()]
    if expected:
        assert list(read_prompts(f"{prompts}:caption, long")) == expected


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), column=st.sampled_from(["", ":a", ":"]))
def test_any_file_gives_prompts_or_a_usage_error(prompts: Path, content: bytes, column: str) -> None:
    prompts.write_bytes(content)
    try:
        found = list(read_prompts(f"{prompts}{column}"))
    except UsageError as refusal:
        found = [str(refusal)]
    assert found
    assert all(text.strip() == text != "" for text in found)


def test_a_hash_is_a_character(prompts: Path) -> None:
    prompts.write_text("# not a comment\n\n   \n  a cat  \n")
    assert list(read_prompts(str(prompts))) == ["# not a comment", "a cat"]


def test_a_path_with_colons_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a:b"
    path.write_text("cat,dog\n1,2\n")
    assert list(read_prompts(str(path))) == ["cat,dog", "1,2"]
    assert list(read_prompts(f"{path}:dog")) == ["2"]


def test_a_cell_may_span_lines_and_blank_ones_are_skipped(prompts: Path) -> None:
    prompts.write_bytes(b'\xef\xbb\xbfprompt,n\n"a ""red""\ncat",1\n\n"  ",2\ndog,3\n')
    assert list(read_prompts(f"{prompts}:prompt")) == ['a "red"\ncat', "dog"]


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        (b"", "", "has no prompts"),
        (b"\xef\xbb\xbf\n \n", "", "has no prompts"),
        (b"cat\nd\xffg\n", "", r"prompts\.txt:2: byte 5 isn't UTF-8"),
        (b"\xef\xbb\xbfcat\xff", "", r"prompts\.txt:1: byte 6 isn't UTF-8"),
        ("cat\n".encode("utf-16"), "", "byte 0 isn't UTF-8: save the file as UTF-8"),
        ("cat\n".encode("utf-16-le"), "", ":1: holds a zero byte"),
        (b"cat\n" + b"x" * (LIMIT + 1), "", f"prompts\\.txt:2: longer than {LIMIT} characters"),
        (b"id,text\n1,cat\n", ":prompt", "has no column 'prompt': its columns are id, text"),
        (b"", ":prompt", "its columns are none, its first line is empty"),
        (b"a,a\n1,2\n", ":a", "more than one column 'a'"),
        (b"id,text\n", ":text", "has no prompts"),
        (b"id,text\n1,cat\n2\n", ":text", r":3: 1 cells, the header has 2"),
        (b'text\n"cat" dog\n', ":text", ":2: not CSV"),
        (b'text\n"cat\n' + b"dog dog\n" * 20_000, ":text", r"a row longer than 100000 characters: is a quote missing"),
    ],
)
def test_bad_files(prompts: Path, content: bytes, column: str, message: str) -> None:
    prompts.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(read_prompts(f"{prompts}{column}"))


def test_a_line_at_the_limit_is_read(prompts: Path) -> None:
    for line in ("x" * LIMIT, "𝕏" * LIMIT):
        prompts.write_text(line + "\r\ncat", newline="")
        assert list(read_prompts(str(prompts))) == [line, "cat"]


def test_a_csv_file_needs_a_column(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("id,text\n1,cat\n")
    with pytest.raises(UsageError, match=r"captions\.csv:COLUMN, one of id, text"):
        list(read_prompts(str(tmp_path / "captions.csv")))


def test_bad_paths_are_refused_before_reading(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "none.txt"), "", ":x", "a\0b", "x" * 5000):
        with pytest.raises(UsageError, match="doesn't exist"):
            read_prompts(spec)
    with pytest.raises(UsageError, match="is a folder"):
        read_prompts(str(tmp_path))


@pytest.mark.parametrize("one_line", [True, False])
def test_memory_is_bounded_for_a_hundred_megabytes(prompts: Path, one_line: bool) -> None:
    piece = b"x" if one_line else b"a photo of a cat\n"
    with prompts.open("wb") as file:
        for _ in range(100):
            file.write(piece * (2**20 // len(piece)))
    tracemalloc.start()
    try:
        if one_line:
            with pytest.raises(UsageError, match=r"prompts\.txt:1: longer than"):
                next(read_prompts(str(prompts)))
        else:
            reader = read_prompts(str(prompts))
            assert all(next(reader) == "a photo of a cat" for _ in range(50_000))
            reader.close()  # type: ignore[attr-defined]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Measured: 0.82 MB and 7 kB.
    assert peak < 2 * 2**20


@pytest.mark.parametrize("kind", ["artist", "object", "none"])
def test_concepts_and_targets_expand_alongside(kind: str) -> None:
    phrases = PHRASES[kind]  # type: ignore[index]
    concepts, targets = expand(["gun", "a {} knife"], kind), expand(["cat", " "], kind)  # type: ignore[arg-type]
    each = len(phrases) + 1
    assert len(concepts) == len(targets) == 2 * each
    assert (concepts[0], concepts[each], targets[0]) == ("gun", "a {} knife", "cat")
    for phrase, concept, target in zip(phrases, concepts[1:each], targets[1:each], strict=True):
        assert phrase.split("{}") == concept.split("gun") == target.split("cat")
    assert set(targets[each:]) == {" "}


def test_the_published_phrases() -> None:
    """As unified-concept-editing's script words them."""
    assert expand(["Monet"], "artist") == (
        "Monet",
        "painting by Monet",
        "art by Monet",
        "artwork by Monet",
        "picture by Monet",
        "style of Monet",
    )
    objects = ("cat", "image of cat", "photo of cat", "portrait of cat", "picture of cat", "painting of cat")
    assert expand(["cat"], "object") == objects
    with pytest.raises(UsageError, match="expand = 'car': give one of artist, object, none"):
        expand(["cat"], "car")  # type: ignore[arg-type]


def test_pairs() -> None:
    assert paired(["gun", "axe"], ["cat"], "none") == (("gun", "cat"), ("axe", "cat"))
    assert paired(["gun", "axe"], ["cat", ""], "object")[7:9] == (("image of axe", ""), ("photo of axe", ""))
    for concepts, targets, message in (
        ([], ["cat"], "nothing to erase"),
        (["a", "b"], ["c", "d", "e"], "3 targets for 2 concepts"),
        (["a"], [], "0 targets for 1"),
        (["a", " \t"], ["c"], r"' \\t' is empty"),
        (["gun", "axe", " gun"], ["c"], "' gun' is given twice"),
        (["a  gun"], ["a gun"], "'a  gun' is its own target"),
    ):
        with pytest.raises(UsageError, match=message):
            paired(concepts, targets, "none")
    with pytest.raises(UsageError, match="'photo of gun' is given twice"):
        paired(["gun", "photo of gun"], ["c"], "object")


@given(st.text())
def test_what_is_shown_is_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()
    assert short(text).isprintable()
    assert len(short(text)) <= 60
    assert words(f" {text}\n") == words(text)
