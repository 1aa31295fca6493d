"""Files of keys: with and without tenants, and errors that name a line and never a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from excise.errors import UsageError
from excise.serve.http_keys import read_keys
from excise.serve.http_settings import key_digest

ONE, TWO, THREE = (f"{number}123456789abcdef-key" for number in range(3))


def file_of(folder: Path, text: str, name: str = "keys.txt") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_keys_of_tenants_and_of_none(tmp_path: Path) -> None:
    file = file_of(tmp_path, f"# studios\n\n  {ONE}\n{TWO}   studio two  \r\n\t{THREE}\tother\n")
    assert read_keys([file]) == {key_digest(ONE): None, key_digest(TWO): "studio two", key_digest(THREE): "other"}


def test_several_files_and_the_variable(tmp_path: Path) -> None:
    files = [file_of(tmp_path, f"{ONE} studio\n", "a"), file_of(tmp_path, f"{TWO} studio\n{ONE} studio\n", "b")]
    found = read_keys(files, f" {THREE},{THREE}\n")
    assert found == {key_digest(THREE): None, key_digest(ONE): "studio", key_digest(TWO): "studio"}
    assert read_keys([], " , ") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none\n", "holds no key: write one a line"),
        (f"{ONE}\nshort studio\n", "line 2: an API key has 5 characters"),
        (f"{ONE} studio\n{ONE} other\n", "line 2: this key is another tenant's already"),
        (f"{ONE} studio\n{ONE}\n", "line 2: this key is another tenant's already"),
        (f"{ONE} # of the studio\n", "line 1: '# of the studio' is no tenant's name: a comment has its own line"),
        (f"{ONE} a\x1b[2J\n", "is no tenant's name"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_keys([file_of(tmp_path, text)])
    assert message in str(caught.value)
    assert str(tmp_path / "keys.txt") in str(caught.value)
    assert ONE not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_variables_keys_belong_to_no_tenant(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another tenant's already"):
        read_keys([file_of(tmp_path, f"{ONE} studio\n")], ONE)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        read_keys([tmp_path / "none"])
