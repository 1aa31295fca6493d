"""Outputs appear whole or not at all, and nothing of the user's is replaced."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from excise.errors import OutputError
from excise.output import PARTIAL, check_free, new_file, new_folder, replaced_folder


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(PARTIAL)]


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert not leftovers(out.parent)


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as partial:
        (partial / "a").write_text("1")
    assert (out / "a").exists()


def fill(out: Path, failure: BaseException) -> None:
    """Write a little into a new folder and into a new file, then fail."""
    opened = new_file(out) if out.suffix else new_folder(out)
    with opened as partial:
        (partial if out.suffix else partial / "a").write_text("1")
        raise failure


@pytest.mark.parametrize("name", ["folder", "file.txt"])
@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, name: str, failure: BaseException) -> None:
    with pytest.raises(type(failure)):
        fill(tmp_path / name, failure)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    with pytest.raises(OutputError, match="not empty"), new_folder(tmp_path):
        pass
    with pytest.raises(OutputError, match="exists already"), new_file(mine):
        pass
    with pytest.raises(OutputError, match="exists already"), new_file(tmp_path / "late"):
        (tmp_path / "late").write_text("mine")
    assert mine.read_text() == "mine"
    assert (tmp_path / "late").read_text() == "mine"
    assert not leftovers(tmp_path)


def test_a_file_in_place_of_a_parent_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        check_free(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "can't be written"), (errno.EROFS, "can't")]
)
def test_the_systems_errors_become_one_line(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(OutputError, match=message), new_folder(tmp_path / "out"):
        raise OSError(number, "from the system")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with replaced_folder(out) as partial:
        (partial / "new").write_text("2")
        assert [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in out.iterdir()] == ["new"]
    assert not leftovers(tmp_path)


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with replaced_folder(tmp_path / "link") as partial:
        (partial / "new").write_text("2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "new").read_text() == "2"


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_folder_that_isnt_replaced_is_as_it_was(tmp_path: Path, failure: BaseException) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")

    def replace() -> None:
        with replaced_folder(out) as partial:
            (partial / "new").write_text("2")
            raise failure

    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)):
        replace()
    assert [path.name for path in out.iterdir()] == ["old"]
    assert not leftovers(tmp_path)


def test_where_names_cant_be_exchanged_out_is_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **options: object())
    with pytest.raises(OutputError, match=r"can't be replaced in one step here .*--out"), replaced_folder(out):
        pass
    assert [path.name for path in out.iterdir()] == ["old"]
    assert not leftovers(tmp_path)
