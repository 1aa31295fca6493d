"""Files of prompts: what survives, and what is refused with the line that is wrong."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pytest

from excise.errors import UsageError
from excise.eval.prompt_file import Columns, PromptEncodingWarning, read_prompt_file

COLUMNS = Columns(seed="seed", guidance="guidance", label="class", id="case")
HEADER = "case,prompt,seed,guidance,class\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.csv"


def test_every_column_is_read(file: Path) -> None:
    file.write_text(HEADER + "7,a lighthouse,4261553411,7.5,sea\n9,a mill,0,7,land\n")
    first, second = read_prompt_file(file, COLUMNS)
    assert (first.id, first.prompt, first.seed, first.guidance_scale, first.label) == (
        "7", "a lighthouse", 4261553411, 7.5, "sea",
    )  # fmt: skip
    assert (second.line, second.number, second.seed, second.guidance_scale) == (3, 1, 0, 7.0)


def test_a_rows_own_size(file: Path) -> None:
    file.write_text("prompt,w,h\na mill,512,384.0\n")
    (row,) = read_prompt_file(file, Columns(width="w", height="h"))
    assert (row.width, row.height) == (512, 384)
    assert read_prompt_file(file, Columns())[0].width is None


@pytest.mark.parametrize("cell", ["500", "0", "4104", "-8", "512.5", "big", "٨", "8_0", "1e3", "inf"])
def test_sides_that_no_image_has(file: Path, cell: str) -> None:
    file.write_text(f"prompt,w,h\na mill,512,{cell}\n")
    with pytest.raises(UsageError, match=r"prompts.csv:2: h = .*: give pixels, a multiple of 8 up to 4096"):
        read_prompt_file(file, Columns(width="w", height="h"))


def test_without_columns_rows_go_by_their_number(file: Path) -> None:
    file.write_text("prompt\na mill\n\na lighthouse\n")
    rows = read_prompt_file(file, Columns())
    assert [(row.id, row.line, row.seed, row.label, row.negative_prompt) for row in rows] == [
        ("0", 2, None, None, None),
        ("1", 4, None, None, None),
    ]


def test_quotes_commas_and_line_ends_inside_a_prompt_survive(file: Path) -> None:
    prompts = ['a "red" mill, at dawn', "two\nlines", "dos\r\nlines", " spaces around ", "π, 🪦", ",", '"']
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["prompt", "seed"], *([prompt, 1] for prompt in prompts)])
    file.write_bytes(table.getvalue().encode())
    rows = read_prompt_file(file, Columns(seed="seed"))
    assert [row.prompt for row in rows] == prompts
    # Each row starts where the one before it ended, whatever its cells hold.
    assert [row.line for row in rows] == [2, 3, 5, 7, 8, 9, 10]


def test_random_tables_are_read_as_they_were_written(file: Path) -> None:
    rng = random.Random(0)
    for _ in range(50):
        prompts = ["x" + "".join(rng.choices('ab,";\n\r\t é', k=rng.randrange(12))) for _ in range(9)]
        table = io.StringIO(newline="")
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        csv.writer(table, quoting=quoting).writerows([["prompt"], *([prompt] for prompt in prompts)])
        file.write_bytes(table.getvalue().encode())
        assert [row.prompt for row in read_prompt_file(file, Columns())] == prompts


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_and_byte_order_mark_are_no_part_of_the_table(file: Path, line_end: bytes) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + line_end.join([b"prompt,seed", b"a mill,3", b"a sail,4", b""]))
    rows = read_prompt_file(file, Columns(seed="seed"))
    assert [(row.line, row.prompt, row.seed) for row in rows] == [(2, "a mill", 3), (3, "a sail", 4)]


def test_latin_1_is_read_with_a_warning_that_names_the_line(file: Path) -> None:
    file.write_bytes("prompt\na mill\nun café\n“quoted”\n".encode("cp1252"))
    with pytest.warns(PromptEncodingWarning, match=r"prompts\.csv:3: isn't UTF-8"):
        rows = read_prompt_file(file, Columns())
    assert [row.prompt for row in rows] == ["a mill", "un café", "“quoted”"]
    # 0x81 is none of Windows-1252's.
    file.write_bytes(b"prompt\ncaf\xe9 \x81\n")
    with pytest.warns(PromptEncodingWarning):
        assert read_prompt_file(file, Columns())[0].prompt == "café \x81"


def test_text_files_have_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes('\ufeffa mill, "old"\r\n\r\n  a sail\u2028x\n'.encode())
    rows = read_prompt_file(file, Columns())
    assert [(row.line, row.id, row.prompt) for row in rows] == [(1, "0", 'a mill, "old"'), (3, "1", "a sail\u2028x")]
    with pytest.raises(UsageError, match="has prompts alone, and the columns seed, class are needed: give a CSV file"):
        read_prompt_file(file, Columns(seed="seed", label="class"))


def test_tabs_between_cells(tmp_path: Path) -> None:
    file = tmp_path / "prompts.tsv"
    file.write_text("prompt\tseed\na mill, a sail\t5\n")
    assert [(row.prompt, row.seed) for row in read_prompt_file(file, Columns(seed="seed"))] == [("a mill, a sail", 5)]


def test_rows_of_empty_cells_and_cells_behind_the_last_column_are_nothing(file: Path) -> None:
    file.write_text("prompt,seed\na mill,1,,\n,\na sail,2\n , \n")
    assert [(row.number, row.line) for row in read_prompt_file(file, Columns(seed="seed"))] == [(0, 2), (1, 4)]


def test_whole_numbers_as_spreadsheets_write_them(file: Path) -> None:
    file.write_text("prompt,seed,guidance\na, 41337.0 ,7.\nb,9223372036854775807,1e1\n")
    rows = read_prompt_file(file, Columns(seed="seed", guidance="guidance"))
    assert [(row.seed, row.guidance_scale) for row in rows] == [(41337, 7.0), (2**63 - 1, 10.0)]


@pytest.mark.parametrize(
    ("seed", "guidance", "message"),
    [
        ("x", "7", ":3: seed = 'x': give a whole number from 0"),
        ("-1", "7", ":3: seed = '-1': give a whole number from 0"),
        ("1.5", "7", ":3: seed = '1.5'"),
        ("1_000", "7", ":3: seed = '1_000'"),
        ("٣", "7", ":3: seed = '٣'"),
        ("9223372036854775808", "7", ":3: seed = '9223372036854775808'"),
        ("nan", "7", ":3: seed = 'nan'"),
        ("", "7", ":3: seed is empty: fill it"),
        ("1", "strong", ":3: guidance = 'strong': give a number"),
        ("1", "nan", ":3: guidance = 'nan'"),
        ("1", "inf", ":3: guidance = 'inf'"),
        ("1", "1e999", ":3: guidance = '1e999'"),
        ("1", "-7", ":3: guidance = '-7'"),
        ("1", '"7,5"', ":3: guidance = '7,5'"),
        ("1", " ", ":3: guidance is empty: fill it"),
    ],
)
def test_what_is_no_number_names_its_row_and_column(file: Path, seed: str, guidance: str, message: str) -> None:
    file.write_text(f"prompt,seed,guidance\na mill,1,7\na sail,{seed},{guidance}\n")
    with pytest.raises(UsageError) as refusal:
        read_prompt_file(file, Columns(seed="seed", guidance="guidance"))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column 'prompt': its columns are none, the file is empty"),
        (b"prompt\n", "has no prompts: write one a row"),
        (b"text,seed\na,1\n", "has no column 'prompt': its columns are text, seed"),
        (b"prompt;seed\na;1\n", "has no column 'prompt': its columns are prompt;seed"),
        (b"prompt,prompt\na,b\n", "has more than one column 'prompt': its columns are prompt, prompt"),
        (b"prompt,seed\na mill\n", ":2: 1 cells, the header has 2"),
        (b"prompt,seed\na mill, old,1\n", ":2: 3 cells, the header has 2: put cells with commas in quotes"),
        (b"prompt,seed\na,1\n,2\n", ":3: prompt is empty: fill it, or remove the row"),
        (b'prompt\na\n"b\nc\nd\n', ":3: not CSV, unexpected end of data"),
        (b'prompt\na\n"b" c\n', ":3: not CSV"),
        (b"prompt\na\nb\0c\n", ":3: holds a zero byte"),
        ("prompt\na mill\n".encode("utf-16"), "is in UTF-16: save it as UTF-8"),
        (b"prompt\na\n" + b"x" * 100_001 + b"\n", ":3: a row longer than 100000 characters"),
        (b'prompt\na\n"' + b"x\n" * 60_000, ":3: a row longer than 100000 characters: is a quote missing?"),
    ],
)
def test_broken_tables_are_refused_with_the_line(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        read_prompt_file(file, Columns())
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(str(file))


def test_a_long_prompt_below_the_limit_is_read(file: Path) -> None:
    file.write_text(f"prompt\n{'x' * 99_990}\n")
    assert len(read_prompt_file(file, Columns())[0].prompt) == 99_990


def test_an_empty_prompt_is_kept_where_that_is_meant(file: Path) -> None:
    file.write_text("prompt,seed\na mill,1\n,2\n")
    rows = read_prompt_file(file, Columns(seed="seed"), empty_prompts="keep")
    assert [(row.prompt, row.seed) for row in rows] == [("a mill", 1), ("", 2)]


def test_ids_that_stand_twice_name_both_lines(file: Path) -> None:
    file.write_text(HEADER + 'a,"a\nmill",1,7,x\nb,a sail,2,7,x\nA,a bell,3,7,x\n')
    with pytest.raises(UsageError, match=r":5: case 'A' is on line 2 already"):
        read_prompt_file(file, COLUMNS)
    rows = read_prompt_file(file, COLUMNS, duplicate_ids="number")
    assert [row.id for row in rows] == ["0", "1", "2"]


def test_ids_stay_where_falling_back_is_allowed_but_not_needed(file: Path) -> None:
    file.write_text(HEADER + "5,a mill,1,7,x\n3,a sail,2,7,x\n")
    assert [row.id for row in read_prompt_file(file, COLUMNS, duplicate_ids="number")] == ["5", "3"]


def test_places_that_are_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: name a file of prompts"):
        read_prompt_file(tmp_path, Columns())
    with pytest.raises(UsageError, match="doesn't exist: name a file of prompts"):
        read_prompt_file(tmp_path / "none.csv", Columns())
    with pytest.raises(UsageError, match="can't be read"):
        read_prompt_file(Path("a\0b"), Columns())
